"""Check and time our passes on a GPU, in one run of under seven minutes: all that docs/gpu.md says.

python benchmarks/gpu.py --json gpu.jsonl                     # on a machine with a GPU
python benchmarks/gpu.py --json gpu.jsonl --sections check passes
python benchmarks/gpu.py --small                              # tiny shapes on a pretended GPU

Needs torch and jaxtyping, and nothing that reads lakes or starts clusters. Sections stand alone, in
order of worth: one that fails is a line and not the end, one for which there is no time is skipped
(`--limit`, seconds). Each line is JSON and names the card, its driver and the versions. `predicted`
is what the choice of forms reckons with (gmm_dist/em/gpu/prices.py, from one H200), `measured`
what this run saw. Exit status 1 where a check disagrees or a section fails.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import append, description
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # not installed on a borrowed machine

from gmm_dist import devices
from gmm_dist.config import EMConfig
from gmm_dist.em import loop
from gmm_dist.em.estep import EStep, SumMoments
from gmm_dist.em.gpu.prices import prices
from gmm_dist.em.lane import Lane, grouped, task_of
from gmm_dist.em.lane_batch import LaneBatch, Precision
from gmm_dist.em.mstep import moments_of, step
from gmm_dist.em.statistics import PassStatistics, TotalMoments
from gmm_dist.model.covariance import COVARIANCE_TYPES, TYPE_OF
from gmm_dist.model.natural import natural
from gmm_dist.model.parameters import Parameters, ParameterStack
from gmm_dist.shards.local import LocalShards
from gmm_dist.shards.protocol import Block, ShardRows
from gmm_dist.shards.tree_sum import run_on

FORMS = ("float32", "float64", "screened")
_ALLOWED = {"float32": 1e-4, "float64": 1e-11, "screened": 1e-8}
"""Largest error of the log-likelihood per row (nats) and of the moments (of their largest)."""
_MOST = 200.0  # survivors, with which a screened pass is timed
_FLASH_GMM = {"peer": "Flash-GMM", "on": "H100", "ms": 622, "error": 5e-3}
"""What its authors publish for 1M × 128, K = 1,024, full: theirs, never run here."""


@dataclass(frozen=True)
class Shape:
    """n rows of d features, K components of one covariance type; means lie `sep` σ apart."""

    kind: str
    n: int
    d: int
    k: int
    sep: float

    @property
    def flops(self) -> float:
        """What the two matrix products of one pass multiply and add: 4 n K P."""
        return 4.0 * self.n * self.k * TYPE_OF[self.kind].n_rows(self.d)


@dataclass(frozen=True)
class Bench:
    """Where this run works, how large, and where its lines go."""

    device: torch.device
    small: bool
    path: Path | None
    about: dict[str, Any]
    began: float
    limit: float

    def record(self, name: str, **values: Any) -> None:
        """Write a line."""
        at = round(time.perf_counter() - self.began, 1)
        append({"benchmark": "gpu", "name": name, "at": at, **values, **self.about}, self.path)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def ms(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Return the median of so many times, after one to warm up."""
        times = []
        for _ in range(1 + (1 if self.small else repeats)):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times[1:])

    def sized(self, n: int, d: int, k: int) -> tuple[int, int, int]:
        return (600, 6, 5) if self.small else (n, d, k)

    @functools.cached_property
    def numbers(self) -> Any:
        """Return a function that draws standard normal numbers, on the device where it can."""
        where = torch.device("cpu") if self.small else self.device
        generator = torch.Generator(where).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            drawn = torch.randn(*shape, dtype=dtype, generator=generator, device=where)
            return drawn.to(self.device)

        return normal


def shapes(bench: Bench) -> Iterator[Shape]:
    """Yield the shapes that passes are timed at, separated data and overlapping."""
    for kind, n, d, k in (
        ("full", 1_000_000, 128, 1024),
        ("diag", 1_000_000, 128, 1024),
        ("spherical", 1_000_000, 128, 1024),
        ("full", 10_000_000, 64, 64),
    ):
        for sep in (8.0, 3.0):
            yield Shape(kind, *bench.sized(n, d, k), sep)


def problem(bench: Bench, shape: Shape) -> tuple[Tensor, Parameters]:
    """Draw rows X (d, n), float32, of a mixture, and return a start near the truth, on the host."""
    n, d, k = shape.n, shape.d, shape.k
    spread, noise = shape.sep / math.sqrt(2 * d), 0.5 if shape.sep > 6 else 0.2
    normal = bench.numbers
    means = normal(k, d) * spread
    has_products = TYPE_OF[shape.kind].has_products
    if has_products:
        eye = torch.eye(d, dtype=torch.float64, device=bench.device)
        factors = eye + noise / math.sqrt(d) * normal(k, d, d)
    else:
        factors = (1 + noise * normal(k, d)).abs() + 0.1
        if shape.kind == "spherical":
            factors = factors.mean(1, keepdim=True).expand(k, d)
    X = normal(d, n, dtype=torch.float32)
    edges = [n * i // k for i in range(k + 1)]
    for c, (a, b) in enumerate(itertools.pairwise(edges)):
        factor = factors[c].float()
        part = factor @ X[:, a:b] if has_products else factor[:, None] * X[:, a:b]
        X[:, a:b] = part + means[c].float()[:, None]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(bench.device)
    for feature in X:  # line by line, so no second (d, n)
        feature.copy_(feature[order])
    covariances = factors @ factors.mT if has_products else factors.square()
    if shape.kind == "spherical":
        covariances = covariances[:, 0]
    start = Parameters(
        weights=torch.full((k,), 1 / k, dtype=torch.float64),
        means=(means + 0.02 * spread * normal(k, d)).cpu(),
        covariances=(1.02 * covariances).cpu(),
        covariance_type=shape.kind,
    )
    return X, start


def shards_of(X: Tensor, n_shards: int, weight: Tensor | None = None) -> list[ShardRows]:
    """Deal rows (d, n) to shards."""
    edges = [X.shape[1] * i // n_shards for i in range(n_shards + 1)]
    return [
        ShardRows(
            shard=i,
            blocks=[Block(X[:, a:b].contiguous(), None if weight is None else weight[a:b])],
        )
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]


def pass_of(start: Parameters, form: str, n_rows: int) -> EStep:
    """Return the task of one pass in one of `FORMS`."""
    if form != "screened":
        return task_of(grouped([Lane.start(start, EMConfig(precision=form))]), n_rows)
    theta = natural(ParameterStack.of([start])).theta
    return EStep((LaneBatch.of([start], [theta], Precision.CENTRED),), start.n_features)


def run(task: EStep, shards: Sequence[ShardRows]) -> PassStatistics:
    """Make one pass over all shards, as a worker does: sums come to the host."""
    (partial,) = run_on(task, shards, len(shards))
    return partial.summary


# --- Sections, in order of worth -----------------------------------------------------------------


def check(bench: Bench) -> bool:
    """Hold every type in every form against float64 on the CPU; and bits against bits."""
    n, d, k = (400, 5, 3) if bench.small else (3_000, 16, 5)
    agrees = True
    for kind in COVARIANCE_TYPES:
        own = TYPE_OF[kind].alone
        X, start = problem(bench, Shape(own, n, d, k, 6.5))
        if TYPE_OF[kind].is_shared:
            start = Parameters(
                weights=start.weights,
                means=start.means,
                covariances=start.covariances[0],
                covariance_type=kind,
            )
        weight = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
        here = shards_of(X.cpu(), 3, weight)
        there = shards_of(X, 3, weight.to(bench.device))
        for form in FORMS:
            task = pass_of(start, form, n)
            exact = pass_of(start, "screened" if form == "screened" else "float64", n)
            got, want = run(task, there), run(exact, here)
            again = run(task, there)
            one_by_one = [run_on(task, [rows], 4)[0].summary for rows in there]
            on_host = (one_by_one[0] + one_by_one[1]) + one_by_one[2]
            errors = _errors(got, want, has_entropy=form != "float32")
            ok = max(errors.values()) <= _ALLOWED[form]
            bits = _same(got, again)
            tree = _same(got, on_host)
            agrees &= ok and bits and tree
            bench.record(
                "check",
                kind=kind,
                form=form,
                **errors,
                allowed=_ALLOWED[form],
                agrees=ok,
                same_bits_twice=bits,
                same_bits_as_the_hosts_tree=tree,
            )
    return agrees


def _errors(got: PassStatistics, want: PassStatistics, *, has_entropy: bool) -> dict[str, float]:
    (a,), (b,) = got.groups, want.groups
    per_row = (a.log_likelihood - b.log_likelihood).abs().max() / want.n_samples
    relative = (a.moments - b.moments).abs().max() / b.moments.abs().max()
    entropy = (a.entropy - b.entropy).abs().max() / want.n_samples
    errors = {"log_likelihood_error": float(per_row), "moments_error": float(relative)}
    return errors | {"entropy_error": float(entropy)} if has_entropy else errors


def _same(a: PassStatistics, b: PassStatistics) -> bool:
    (x,), (y,) = a.groups, b.groups
    return torch.equal(x.moments, y.moments) and torch.equal(x.log_likelihood, y.log_likelihood)


def passes(bench: Bench) -> bool:
    """Time a pass at every shape in every form, and say what was predicted."""
    for shape in shapes(bench):
        X, start = problem(bench, shape)
        reckoned = prices(shape.kind, shape.k, shape.d, devices.float64_price(bench.device))
        survivors = _survivors(X, start)
        for form in FORMS:
            if form == "screened" and survivors > _MOST and not bench.small:
                continue  # seconds, where products take one: the policy would not
            for n_shards in (1, 8, 32) if shape.d == 128 and shape.kind == "full" else (1,):
                shards, task = shards_of(X, n_shards), pass_of(start, form, shape.n)
                _forget_peak(bench)
                ms = bench.ms(functools.partial(run, task, shards), 2)
                each = (
                    reckoned.screened(survivors) if form == "screened" else getattr(reckoned, form)
                )
                bench.record(
                    "pass",
                    shape=vars(shape),
                    form=form,
                    n_shards=n_shards,
                    survivors=survivors,
                    measured_ms=ms,
                    predicted_ms=each * shape.n / 1e6,
                    tflops=None if form == "screened" else shape.flops / ms / 1e9,
                    peak_gib=_peak(bench),
                )
                del shards
        del X
        _empty(bench)
    bench.record("published", shape="full 1M × 128, K = 1024", **_FLASH_GMM)
    return True


def _survivors(X: Tensor, start: Parameters) -> float:
    """Return how many components matter to a row, of a few thousand rows."""
    some = X[:, :4096].contiguous()
    sums = run(pass_of(start, "screened", some.shape[1]), shards_of(some, 1))
    return float(sums.groups[0].survivors) / sums.n_samples


def ceilings(bench: Bench) -> bool:
    """Time both products alone, at the shapes that passes take them in, and copies."""
    rows = 128 if bench.small else 25_728
    for kind, d, k in (("full", 128, 1024), ("full", 64, 64), ("diag", 128, 1024)):
        if bench.small:
            d, k = 6, 5
        p = TYPE_OF[kind].n_rows(d)
        for name, dtype in (
            ("float64", torch.float64),
            ("float32", torch.float32),
            ("float16", torch.float16),
        ):
            wide = {"out_dtype": torch.float32} if dtype is torch.float16 else {}
            line = -(-k // 8) * 8
            theta = bench.numbers(p, line).to(dtype)[:, :k].T
            phi, resp = bench.numbers(p, rows).to(dtype), bench.numbers(k, rows).to(dtype)
            of_e = bench.ms(lambda a=theta, b=phi, w=wide: torch.mm(a, b, **w))
            of_m = bench.ms(lambda a=phi, b=resp, w=wide: torch.mm(a, b.T, **w))
            flops = 2.0 * k * p * rows / 1e9
            bench.record(
                "ceiling",
                kind=kind,
                d=d,
                k=k,
                rows=rows,
                dtype=name,
                e_tflops=flops / of_e,
                m_tflops=flops / of_m,
            )
    size = 1 << 12 if bench.small else 1 << 26
    numbers = torch.zeros(size, dtype=torch.float64, device=bench.device)
    onto = torch.empty_like(numbers)
    bench.record(
        "copies",
        on_card_gbs=16e-6 * size / bench.ms(lambda: onto.copy_(numbers)),
        pinned_gbs=8e-6 * size / bench.ms(lambda: devices.to_host([numbers])),
        pageable_gbs=8e-6 * size / bench.ms(lambda: numbers.cpu(), 1),
    )
    return True


def m_step(bench: Bench) -> bool:
    """Time the M-step on the card and on the host, and hold one against the other."""
    n, d, k = bench.sized(200_000, 128, 1024)
    X, start = problem(bench, Shape("full", n, d, k, 8.0))
    sums = run(pass_of(start, "float64", n), shards_of(X, 1)).groups[0].moments
    lane = Lane.start(start, EMConfig(precision="float64"))
    zeros = torch.zeros(d, d, dtype=torch.float64)  # which a full covariance does not read
    total = TotalMoments(n_samples=float(n), n_rows=n, sum_x=zeros[0], sum_xx=zeros)

    def made(moments: Tensor) -> Any:
        return step([lane.model], [moments_of(lane, moments, total)])

    there = sums.to(bench.device)
    on_host, on_card = made(sums), made(there)
    far = {
        "theta": _relative(on_card[1].theta, on_host[1].theta),
        "covariances": _relative(
            on_card[0][0].parameters.covariances, on_host[0][0].parameters.covariances
        ),
    }
    card_ms, host_ms = bench.ms(lambda: made(there)), bench.ms(lambda: made(sums), 1)
    bench.record("m_step", card_ms=card_ms, host_ms=host_ms, **far)
    return max(far.values()) < 1e-9


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() - b).abs().max() / b.abs().max())


def fits(bench: Bench) -> bool:
    """Fit end to end, as an estimator does: seconds an iteration, and in which forms."""
    for kind, sep in (("full", 8.0), ("full", 3.0), ("diag", 3.0)):
        n, d, k = bench.sized(1_000_000, 128, 1024)
        X, start = problem(bench, Shape(kind, n, d, k, sep))
        rows = LocalShards(shards_of(X, 8), n_threads=0)
        total = rows.run(SumMoments(d))
        times, forms = [], []

        def watch(lanes: Sequence[Lane], times: Any = times, forms: Any = forms) -> None:
            bench.wait()
            times.append(time.perf_counter())
            forms.append(lanes[0].precision.name)

        began = time.perf_counter()
        (result,) = loop.fit(
            rows, [start], EMConfig(max_iter=8, precision="auto"), total, watch=watch
        )
        seconds = time.perf_counter() - began
        gaps = [b - a for a, b in itertools.pairwise([began, *times])]
        bench.record(
            "fit",
            kind=kind,
            shape=(n, d, k),
            sep=sep,
            seconds=seconds,
            iteration_ms=[round(1e3 * gap, 3) for gap in gaps],
            next_forms=forms,
            n_iter=result.n_iter,
            mean_log_likelihood=result.log_likelihood / result.n_samples,
        )
        _empty(bench)
    return True


def plain_torch(bench: Bench) -> bool:
    """Time the loop that most people write: component by component, Cholesky factors, float32."""
    n, d, k = bench.sized(1_000_000, 128, 1024)
    X, start = problem(bench, Shape("full", n, d, k, 3.0))
    rows, step_rows = X.T.contiguous(), max(1, min(n, (1 << 28) // k))
    factors, _ = start.type.precisions_cholesky(start.covariances)
    factors, means = factors.float().to(bench.device), start.means.float().to(bench.device)

    def one_pass() -> None:
        counts = rows.new_zeros(k)
        sum_x, sum_xx = rows.new_zeros(k, d), rows.new_zeros(k, d, d)
        for first in range(0, n, step_rows):
            x = rows[first : first + step_rows]
            parts = [
                (-0.5 * ((x - m) @ f).square().sum(1)) for m, f in zip(means, factors, strict=True)
            ]
            resp = torch.stack(parts, 1).softmax(1)
            counts += resp.sum(0)
            sum_x += resp.T @ x
            for c in range(k):
                sum_xx[c] += (x * resp[:, c, None]).T @ x

    bench.record("peer", peer="a plain torch loop", shape=(n, d, k), ms=bench.ms(one_pass, 1))
    return True


def small_shapes(bench: Bench) -> bool:
    """Time passes in which launching kernels costs more than what they do."""
    for n, d, k in ((2_000_000, 16, 16), (2_000_000, 64, 64), (200_000, 16, 16)):
        n, d, k = bench.sized(n, d, k)
        X, start = problem(bench, Shape("full", n, d, k, 3.0))
        for form in ("float32", "float64"):
            task = pass_of(start, form, n)
            ms = bench.ms(functools.partial(run, task, shards_of(X, 1)))
            bench.record("small shape", shape=(n, d, k), form=form, ms=ms)
        _empty(bench)
    return True


SECTIONS: dict[str, tuple[Callable[[Bench], bool], float]] = {
    "check": (check, 20),
    "passes": (passes, 120),
    "m_step": (m_step, 20),
    "fits": (fits, 60),
    "ceilings": (ceilings, 20),
    "small_shapes": (small_shapes, 20),
    "plain_torch": (plain_torch, 60),
}
"""Each section, and the seconds that there must be left for it."""


def _forget_peak(bench: Bench) -> None:
    if not bench.small:
        torch.cuda.reset_peak_memory_stats()


def _peak(bench: Bench) -> float | None:
    return None if bench.small else torch.cuda.max_memory_allocated() / 2**30


def _empty(bench: Bench) -> None:
    if not bench.small:
        torch.cuda.empty_cache()


def card(small: bool) -> dict[str, Any]:
    """Return what the figures depend on."""
    if small:
        return {"card": "pretended", "figures": "mean nothing"}
    driver = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    return {"card": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


@contextlib.contextmanager
def _device(small: bool) -> Iterator[torch.device]:
    if not small:
        yield torch.device("cuda", 0)
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
    from pretended_cuda import CUDA, pretended_cuda

    with pretended_cuda():
        yield CUDA


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="prove the script without a GPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=400, help="seconds that the run may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append results to this file")
    chosen = parser.parse_args(argv)
    if not chosen.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: pass --small to prove the script without one")
    began, good = time.perf_counter(), True
    with _device(chosen.small) as device:
        about = card(chosen.small) | {"torch": torch.__version__}
        bench = Bench(device, chosen.small, chosen.json, about, began, chosen.limit)
        bench.record("machine", **{k: v for k, v in description().items() if k != "gpu"})
        for name in chosen.sections:
            section, seconds = SECTIONS[name]
            if time.perf_counter() - began + seconds > chosen.limit:
                bench.record("skipped", section=name)
                continue
            try:
                good &= section(bench)
            except Exception:  # a line, not the end
                good = False
                bench.record("failed", section=name, error=traceback.format_exc()[-1500:])
            _empty(bench)
        bench.record("done", good=good)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
