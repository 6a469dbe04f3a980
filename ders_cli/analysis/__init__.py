"""What a checkpoint's experts are like, and what each codec would make of them: `ders analyze`."""
