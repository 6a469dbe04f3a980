"""Malformed files given to ders, to safetensors' own reader and to transformers: who refuses, takes, crashes on or hangs at them.

    python docs/measure/malformed.py > peers.md

The files are those of tests/malformed.py that a peer can be given: a plain model's folder (safetensors opens its weight files
and reads every tensor; transformers loads the model). Each attempt is a process of its own, forked from one that has
imported everything, with TIME seconds of CPU and MEMORY bytes above that. What ders does is what the tests hold it to.
"""

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "OMP_NUM_THREADS": "1",
}
sys.path[:0] = [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[2])]

import malformed  # noqa: E402
import safetensors  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import transformers.models.mistral.modeling_mistral  # noqa: E402
import transformers.models.mixtral.modeling_mixtral  # noqa: E402
from command import done  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

TIME, MEMORY = 10, 2_000_000_000
SPOKEN = 160  # letters shown of an error
GIVEN = ("plain", "sharded", "dense")


def by_safetensors(folder: Path) -> None:
    """Every weight file, as load_file reads it; the folder's index is not its business."""
    for path in sorted(folder.glob("*.safetensors")):
        load_file(path)
        with safetensors.safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                opened.get_tensor(name)


def by_transformers(folder: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise Told(str({key: sorted(map(str, value))[:2] for key, value in wrong.items()}))


class Told(Exception):
    """It loads, and tells the caller of missing, mismatched or unexpected tensors, which are filled with random numbers."""


def outcome(action: Callable[[Path], None], folder: Path) -> tuple[str, str]:
    """("refuses" | "takes" | "takes, with a note" | "crashes" | "hangs" | "runs out of memory", its words)."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (TIME, TIME + 1))
        signal.alarm(3 * TIME)  # what waits uses no CPU
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        said = "takes"
        try:
            action(folder)
        except Told as told:
            said = f"takes, with a note\n{told}"
        except MemoryError:
            said = "runs out of memory\n"
        except BaseException as error:  # noqa: BLE001 (whatever a peer raises is its answer)
            said = f"refuses\n{type(error).__name__}: {error}"
        os.write(writer, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer, _, words = pipe.read().decode(errors="replace").partition("\n")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        slow = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        return ("hangs" if slow else "crashes"), signal.Signals(number).name
    return answer or "crashes", words


def answer_of_ders(case: malformed.Case) -> str:
    return "refuses" if any(run.code in (2, 4) for run in case.runs) else "takes"


def plain(text: str, length: int = SPOKEN) -> str:
    """For a cell of a table."""
    flat = "".join(c if c.isprintable() else " " for c in text).replace("|", "/").replace("`", "'")
    return " ".join(flat.split())[:length]


def main() -> None:
    print(
        f"safetensors {safetensors.__version__}, transformers {transformers.__version__}, torch {torch.__version__}\n"
    )
    peers = {"safetensors": by_safetensors, "transformers": by_transformers}
    counts: dict[str, Counter] = {}
    differ: dict[tuple[str, str], list[tuple[malformed.Case, dict[str, tuple[str, str]]]]] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(sys.stderr):
        root = Path(scratch)
        (root / "of").mkdir()
        with contextlib.redirect_stdout(sys.stderr):
            malformed.originals(root / "of", done)
        for original in GIVEN:
            for name, action in peers.items():
                found = outcome(action, root / "of" / original)
                assert found[0] == "takes", (original, name, found)  # else a refusal would say nothing
        for number, case in enumerate(case for case in malformed.cases() if case.of in GIVEN):
            folder = malformed.copy_of(root / "of", case, root / str(number) / "m")
            answers = {name: outcome(action, folder) for name, action in peers.items()}
            row = counts.setdefault(case.kind, Counter())
            row["cases"] += 1
            row["ders", answer_of_ders(case)] += 1
            for name, (answer, _) in answers.items():
                row[name, answer] += 1
                if answer != answer_of_ders(case):
                    differ.setdefault((name, f"{answer}; ders {answer_of_ders(case)}"), []).append((case, answers))
    words = ("refuses", "takes", "takes, with a note", "crashes", "hangs", "runs out of memory")
    columns = [("ders", "refuses"), ("ders", "takes")]
    columns += [(name, word) for name in peers for word in words if any(row[name, word] for row in counts.values())]
    print("| class | cases | " + " | ".join(f"{name} {word}" for name, word in columns) + " |")
    print("|---|" + "---|" * (len(columns) + 1))
    for kind, row in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"| {kind} | {row['cases']} | " + " | ".join(str(row[column] or "") for column in columns) + " |")
    for (name, how), several in sorted(differ.items()):
        print(f"\n## {name} {how} ({len(several)})\n\n| case | what {name} says | what ders says |\n|---|---|---|")
        for case, answers in several:
            refused = next((run.said for run in case.runs if run.code in (2, 4)), "")
            ours = refused if answer_of_ders(case) == "refuses" else case.why
            print(f"| {plain(case.id, 80)} | {plain(answers[name][1])} | {plain(ours)} |")


if __name__ == "__main__":
    main()
