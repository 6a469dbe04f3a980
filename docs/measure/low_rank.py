"""Speed and error of the rank codec's factors beside a full SVD and other randomised ones, one BLAS thread.

    python docs/measure/low_rank.py --shape 1408,512 --shape 1024,3584 --rank 4 --rank 16 --rank 64

Deltas are made: a decaying spectrum (256 directions, the k-th k^-0.7 as strong) and noise, as between an upcycled expert and
its base; and noise alone, the flat spectrum, where every method is at its worst. Both are differences of two bf16
matrices. Error is |D - D_r| / |D|, beside the best that any rank r can do. A full SVD of more than --full weights takes
minutes: there it isn't run, and the best comes from the eigenvalues of D D^T in fp64. torch and scikit-learn take part
where they can be imported.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from ders_kernels.cpu_ops import floats, lowrank
from threadpoolctl import threadpool_limits

Factors = tuple[np.ndarray, np.ndarray]


def make_delta(shape: tuple[int, int], decaying: bool) -> np.ndarray:
    draw = np.random.default_rng(0)
    change = 1e-4 * draw.standard_normal(shape, np.float32)
    if decaying:
        count = min(256, *shape)
        strength = (2e-3 * np.arange(1, count + 1, dtype=np.float32) ** -0.7) / np.float32(count) ** 0.5
        left = draw.standard_normal((shape[0], count), np.float32)
        change += (left * strength) @ draw.standard_normal((count, shape[1]), np.float32)
    base = floats.narrow(0.02 * draw.standard_normal(shape, np.float32), "BF16")
    return floats.delta(floats.narrow(floats.widen(base, "BF16") + change, "BF16"), base, "BF16")


def others() -> dict[str, Callable[[np.ndarray, int], Factors]]:
    """Randomised SVDs that can be imported here, at their defaults but as many probes and iterations as ours."""
    found: dict[str, Callable[[np.ndarray, int], Factors]] = {}
    probes, iterations = lowrank.OVERSAMPLE, lowrank.POWER_ITERATIONS
    try:
        import torch

        torch.set_num_threads(1)

        def by_torch(delta: np.ndarray, rank: int) -> Factors:
            u, s, v = torch.svd_lowrank(torch.from_numpy(delta), rank + probes, iterations)
            return (u * s)[:, :rank].numpy(), v.T[:rank].numpy()

        found["torch.svd_lowrank"] = by_torch
    except ImportError:
        print("torch: not here")
    try:
        from sklearn.utils.extmath import randomized_svd

        def by_sklearn(delta: np.ndarray, rank: int) -> Factors:
            u, s, vt = randomized_svd(delta, rank, n_oversamples=probes, n_iter=iterations, random_state=0)
            return u * s, vt

        found["sklearn randomized_svd"] = by_sklearn
    except ImportError:
        print("scikit-learn: not here")
    return found


def timed(call: Callable[[], Factors]) -> tuple[Factors, float, float]:
    """What a call gives, its CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    given = call()
    return given, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", action="append", required=True)
    parser.add_argument("--rank", action="append", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", type=int, default=1 << 22, help="weights up to which the full SVD is run")
    args = parser.parse_args()
    ways = {"ders": lambda delta, rank: lowrank.factors(delta, rank, 1), **others()}
    print(
        "| delta | rank | way | CPU s | wall s | s/GB of bf16 | times as fast as a full SVD: CPU, wall | error | error / best |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in [tuple(map(int, text.split(","))) for text in args.shape]:
        for decaying in (True, False):
            delta = make_delta(shape, decaying)
            with threadpool_limits(1):
                report(delta, f"{list(shape)} {'decaying' if decaying else 'flat'}", ways, args)


def report(delta: np.ndarray, name: str, ways: dict[str, Callable], args: argparse.Namespace) -> None:
    full = None
    if delta.size <= args.full:
        (_, s, _), *full = timed(lambda: np.linalg.svd(delta, full_matrices=False))
        energy = s.astype(np.float64) ** 2
        print(
            f"| {name} | all | numpy.linalg.svd | {full[0]:.2f} | {full[1]:.2f} | {full[0] / delta.size * 5e8:.0f} | 1, 1 | | |"
        )
    else:
        wide = (delta if delta.shape[0] <= delta.shape[1] else delta.T).astype(np.float64)
        energy = np.linalg.eigvalsh(wide @ wide.T)[::-1]
    for rank in args.rank:
        best = np.sqrt(energy[rank:].sum() / energy.sum())
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(args.rounds):  # in turns: what else runs here slows all alike
            products = {}
            for way, factors in ways.items():
                (left, right), cpu, wall = timed(lambda factors=factors, rank=rank: factors(delta, rank))
                seconds[way].append((cpu, wall))
                products[way] = np.linalg.norm(delta - left @ right) / np.linalg.norm(delta)
        for way, error in products.items():
            cpu, wall = np.median(seconds[way], axis=0)
            ratio = f"{full[0] / cpu:.0f}, {full[1] / wall:.0f}" if full else "not run"
            print(
                f"| {name} | {rank} | {way} | {cpu:.3f} | {wall:.3f} | {cpu / delta.size * 5e8:.2f} | {ratio} | "
                f"{error:.4f} | {error / best:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
