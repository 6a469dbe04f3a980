"""Reports as pictures: one HTML page that needs no network, and PNG, PDF or SVG for papers."""
