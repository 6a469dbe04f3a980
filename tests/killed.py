"""What must hold after a run of `ders` was killed, for every command that writes: tests/test_kill.py, docs/measure/kill.py.

sources      untouched, byte for byte and by time
OUT          absent, or complete and the bytes of an undisturbed run; where --overwrite replaces it, the old one, whole;
             absent there only while the new one stands complete in OUT.partial
the command  without --resume and --overwrite: one line and exit 2 where something stands, else it runs
--resume     exit 0, the same bytes in every file, and nothing left beside
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faulty import Ended, Warm
from handmade import save

OUT = "out"
Files = dict[str, bytes]
State = tuple[Files, dict[str, int]]  # bytes by relative path, times of change


@dataclass(frozen=True)
class Scene:
    """A command whose output is OUT in a folder of its own. `old`: OUT is an older output, which it replaces.

    `killed`: a fault of a first run; the scene is the run that resumes it.
    """

    name: str
    arguments: tuple[str, ...]
    old: tuple[str, ...] = ()
    killed: str = ""
    outputs: tuple[str, ...] = (OUT,)

    @property
    def batch(self) -> bool:
        return "--batch" in self.arguments


COMPRESS = ("compress", "../moe", "-o", OUT, "-q", "-j", "1")
SHARDS = ("--max-shard-size", "9kB")
SCENES = (
    Scene("compress int4", (*COMPRESS, "--delta", "int4", *SHARDS)),
    Scene("compress exact", (*COMPRESS, "--delta", "exact", *SHARDS)),
    Scene("compress drop0.5+int4", (*COMPRESS, "--delta", "drop0.5+int4", *SHARDS)),
    Scene("compress int4, one shard", (*COMPRESS, "--delta", "int4")),
    Scene("compress exact, one shard", (*COMPRESS, "--delta", "exact")),
    Scene("decompose", ("decompose", "../moe", "-o", OUT, "-q", "-j", "1", *SHARDS)),
    Scene("sparsify", ("sparsify", "../decomposed", "--drop", "0.5", "-o", OUT, "-q", "-j", "1", *SHARDS)),
    Scene("quantize", ("quantize", "../decomposed", "--bits", "4", "-o", OUT, "-q", "-j", "1", *SHARDS)),
    Scene("restore", ("restore", "../decomposed", "-o", OUT, "-q", "-j", "1")),
    Scene("restore, one shard", ("restore", "../whole-int4", "-o", OUT, "-q", "-j", "1")),
    Scene("upcycle --rank", ("upcycle", "../dense", "--rank", "2", "-o", OUT, "-q", "-j", "1", *SHARDS)),
    Scene("upcycle --full", ("upcycle", "../dense", "--full", "-o", OUT, "-q", "-j", "1", *SHARDS)),
    Scene(
        "compress --overwrite",
        (*COMPRESS, "--delta", "int4", *SHARDS, "--overwrite"),
        old=(*COMPRESS, "--delta", "exact"),
    ),
    Scene("restore --overwrite", ("restore", "../decomposed", "-o", OUT, "-q", "--overwrite", "-j", "1"), old=COMPRESS),
    Scene("compress --resume", (*COMPRESS, "--delta", "int4", *SHARDS, "--resume"), killed="kill:45"),
    Scene("compress --resume, one shard", (*COMPRESS, "--delta", "exact", "--resume"), killed="kill:24"),
    Scene("restore --resume", ("restore", "../decomposed", "-o", OUT, "-q", "-j", "1", "--resume"), killed="kill:24"),
    Scene(
        "compress --batch",
        ("compress", "--batch", "../list", "-o", ".", "--delta", "int4", "-q", "-j", "1"),
        outputs=("one", "two", "three"),
    ),
)
BY_NAME = {scene.name: scene for scene in SCENES}


def make_models(
    root: Path, experts: int = 3, hidden: int = 24, inner: int = 20, layers: int = 2, files: int = 4
) -> None:
    """moe: Mixtral's layout in `files` files, with a tokenizer beside them; dense: llama's; list: a batch."""
    random = np.random.default_rng(0)

    def bits(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape, np.float32) * np.float32(0.3)).view(np.uint32)

    def near(base: np.ndarray) -> np.ndarray:
        weights = base.view(np.float32)
        return (weights + np.float32(0.01) * random.standard_normal(weights.shape, np.float32)).view(np.uint32)

    up, down = (inner, hidden), (hidden, inner)
    config = {"model_type": "mixtral", "hidden_act": "silu", "num_local_experts": experts, "hidden_size": hidden}
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "architectures": ["MixtralForCausalLM"]}
    tensors, dense = {"model.embed_tokens.weight": ("F32", bits(64, hidden))}, {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{prefix}.gate.weight"] = ("F32", bits(experts, hidden))
        for name, shape in (("w1", up), ("w2", down), ("w3", up)):
            base = bits(*shape)
            tensors |= {f"{prefix}.experts.{i}.{name}.weight": ("F32", near(base)) for i in range(experts)}
        for name, shape in (("gate", up), ("up", up), ("down", down)):
            dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = ("F32", bits(*shape))
    save(root / "moe", tensors, config, files)
    (root / "moe" / "tokenizer.json").write_text("a tokenizer" * 9)
    config = {"model_type": "llama", "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": inner}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    dense["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    save(root / "dense", dense, config)
    for name in ("one", "two", "three"):
        save(
            root / f"of-{name}",
            dict(list(tensors.items())[: 2 + 3 * experts]),
            CONFIG_OF_ONE | {"num_local_experts": experts},
        )
    lines = [f"{root}/of-{name} {name}" for name in ("one", "two", "three")]
    (root / "list").write_text("\n".join(lines) + "\n")


CONFIG_OF_ONE = {"model_type": "mixtral", "hidden_act": "silu", "num_hidden_layers": 1}


class Stage:
    """Models, one warm process, and a folder in which runs are killed."""

    def __init__(self, root: Path, warm: Warm):
        self.root, self.warm, self.place = root, warm, root / "place"
        make_models(root)
        self.place.mkdir()
        for arguments in (
            ("decompose", root / "moe", "-o", root / "decomposed", "-q", "-j", "1", *SHARDS),
            ("compress", root / "moe", "--delta", "int4", "-o", root / "whole-int4", "-q", "-j", "1"),
            ("sparsify", root / "decomposed", "--drop", "0.5", "-o", root / "sparse", "-q", "-j", "1"),
            ("restore", root / "sparse", "-o", root / "restored", "-q", "-j", "1"),
            ("upcycle", root / "dense", "--rank", "2", "-o", root / "upcycled", "-q", "-j", "1"),
        ):
            warm.warm(*arguments)
        self.sources = read_state(root)
        self._expected: dict[Scene, tuple[Files, Ended]] = {}
        self._old: dict[Scene, Files] = {}

    def run(self, arguments: tuple[str, ...], fault: str = "none:0", **setting: Any) -> Ended:
        return self.warm.wait(self.start(arguments, fault, **setting))

    def start(self, arguments: tuple[str, ...], fault: str = "none:0", **setting: Any) -> int:
        return self.warm.start(self.root, *self.placed(arguments), fault=fault, **setting)

    def placed(self, arguments: tuple[str, ...]) -> list[str]:
        """Arguments with their paths made absolute: models stand beside the place."""
        here = {OUT: self.place / OUT, ".": self.place}
        return [str(self.root / a[3:] if a.startswith("../") else here.get(a, a)) for a in arguments]

    def expected(self, scene: Scene) -> Files:
        """The files of an undisturbed run, by paths in the place."""
        return self.undisturbed(scene)[0]

    def undisturbed(self, scene: Scene) -> tuple[Files, Ended]:
        """The same, and how the run of the scene ended that was not disturbed."""
        if scene not in self._expected:
            self.set(scene)
            ended = self.run(scene.arguments)
            assert ended.code == 0, (scene.name, ended)
            files = files_of(self.place)
            assert {name.split("/")[0] for name in files} == set(scene.outputs), (scene.name, list(files))
            self._expected[scene] = files, ended
            if scene.killed:
                fresh = BY_NAME.get(scene.name.replace(" --resume", ""))
                assert fresh is None or files == self.expected(fresh), scene.name
        return self._expected[scene]

    def set(self, scene: Scene) -> None:
        """The place as it is when the scene's run begins."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        if scene.old:
            if scene not in self._old:
                assert self.run(scene.old).code == 0
                self._old[scene] = files_of(self.place)
            write_files(self.place, self._old[scene])
        if scene.killed:
            ended = self.run(tuple(a for a in scene.arguments if a != "--resume"), scene.killed)
            assert ended.code == -9, (scene.name, ended)

    def check(self, scene: Scene, also_plain: bool = True) -> str:
        """After a kill: the invariants, or AssertionError. How the run survived: absent, old, resumed, complete ..."""
        assert read_state(self.root, skip="place") == self.sources, "a source was changed"
        expected, found = self.expected(scene), files_of(self.place)
        outs = {name: _below(found, name) for name in scene.outputs}
        partials = {name: (self.place / f"{name}.partial").is_dir() for name in scene.outputs}
        states = []
        for name, files in outs.items():
            wanted = _below(expected, name)
            extra = {file for file in files if file.startswith(".ders-")}  # what a run keeps for itself
            clean = {file: data for file, data in files.items() if file not in extra}
            old = _below(self._old.get(scene, {}), name)
            if clean == wanted and files:
                states.append("complete")
            elif files and files == old:
                states.append("old")
            else:
                assert not files, f"{name} is half of an output: {sorted(files)}"
                if old:
                    new = _below(found, f"{name}.partial")
                    whole = all(new.get(file) == data for file, data in wanted.items())
                    assert whole or _below(found, f"{name}.ders-replaced") == old, f"{name}: old and new are lost"
                    states.append("between")
                else:
                    states.append("resumed" if partials[name] else "absent")
        if also_plain and not scene.batch:
            self._check_plain(scene, found, bool(outs[OUT]) or partials[OUT])
        if scene.batch or partials[OUT]:
            again = scene.arguments if scene.batch else (*scene.arguments, "--resume")
        elif states == ["complete"]:
            if not (left := self.left_over(scene)):
                return "complete"
            assert all(name == f"{OUT}.ders-replaced" or name.startswith(f"{OUT}/.ders-") for name in left), left
            states = ["complete with remains"]
            again = (*scene.arguments, "--overwrite")  # a later run takes them away
        else:
            again = tuple(a for a in scene.arguments if a != "--resume") if scene.killed else scene.arguments
        ended = self.run(again)
        assert ended.code == 0, (again, ended)
        after, left = files_of(self.place), self.left_over(scene)
        assert left == [], left
        assert after == expected, _differing(after, expected)
        assert read_state(self.root, skip="place") == self.sources, "a source was changed"
        return "+".join(dict.fromkeys(states))

    def starve(self, scene: Scene, fault: str, codes: tuple[int, ...] = (1,)) -> str:
        """A run in which calls fail: one line that names a file, and the rest as after a kill. How it ended."""
        self.set(scene)
        ended = self.run(scene.arguments, fault)
        assert ended.code in (0, *codes) and "Traceback" not in ended.err, ended
        if ended.code and not scene.batch:
            assert str(self.root) in ended.line, ended.line
        survived = self.check(scene, also_plain=False)
        assert ended.code or survived.startswith("complete"), (ended, survived)
        return f"exit {ended.code}, {survived}"

    def _check_plain(self, scene: Scene, found: Files, stands: bool) -> None:
        """The same command, without --resume and --overwrite, does no harm."""
        plain = tuple(a for a in scene.arguments if a not in ("--resume", "--overwrite"))
        before = read_state(self.place)
        ended = self.run(plain)
        if ended.code == 0:  # nothing had begun to stand there
            assert not _below(found, OUT), "OUT was replaced without being asked"
            assert not any(".safetensors" in name for name in found), "a begun output was thrown away"
            assert _below(files_of(self.place), OUT) == _below(self.expected(scene), OUT)
            assert self.left_over(scene) == []
            shutil.rmtree(self.place / OUT)
            write_files(self.place, found)
        else:
            assert stands and ended.code == 2 and ended.line, ended
            assert read_state(self.place)[0] == before[0], "a refused run changed something"

    def left_over(self, scene: Scene) -> list[str]:
        """What stands in the place beside the outputs, and of what a run keeps for itself within them."""
        beside = [path.name for path in self.place.iterdir() if path.name not in scene.outputs]
        return beside + [name for name in files_of(self.place) if "/.ders-" in name or name.endswith(".partial")]


def read_state(folder: Path, skip: str = "") -> State:
    """Every file's bytes and time of change."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.relative_to(folder).parts[0] != skip]
    named = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items()}, {
        name: path.stat().st_mtime_ns for name, path in named.items()
    }


def files_of(folder: Path) -> Files:
    """Bytes of all files, by paths in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Files) -> None:
    """The inverse of files_of."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _below(files: Files, folder: str) -> Files:
    return {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")}


def _differing(found: Files, expected: Files) -> list[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


# --- what resuming costs ---


def cost_of_resuming(root: Path, warm: Warm) -> Iterator[tuple[str, int, int]]:
    """(command, bytes of inputs that an undisturbed run reads, bytes that a resumed one reads after a kill at 90 %)."""
    for files, shard in ((10, "250kB"), (1, "5GB")):
        place = root / f"{files}-files"
        make_models(place, experts=4, hidden=64, inner=96, layers=10, files=files)
        for delta in ("int4", "exact"):
            command = ("compress", place / "moe", "--delta", delta, "--max-shard-size", shard)
            yield _cost(warm, place, f"compress {delta}", *command, "-o", place / delta)
        yield _cost(warm, place, "restore", "restore", place / "exact", "-o", place / "plain")


def _cost(warm: Warm, place: Path, name: str, *command: object) -> tuple[str, int, int]:
    out, command = Path(str(command[-1])), (*command, "-q", "-j", "1")
    whole = warm.run(place, *command)
    assert whole.code == 0, whole
    expected, bytes_read = files_of(out), whole.report["read_bytes"]
    shutil.rmtree(out)
    killed = warm.run(place, *command, fault=f"read-kill-bytes:{bytes_read * 9 // 10}")
    assert killed.code == -9, killed
    resumed = warm.run(place, *command, "--resume")
    assert resumed.code == 0 and files_of(out) == expected, resumed
    shards = sum(file.endswith(".safetensors") for file in expected)
    return f"{name}, {shards} output file{'s' * (shards > 1)}", bytes_read, resumed.report["read_bytes"]
