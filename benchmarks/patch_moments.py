"""Second moments of patches: explicit patches and one product (im2col) against `Convolution.input_moment`.

Run `OPENBLAS_NUM_THREADS=1 python benchmarks/patch_moments.py [repetitions]`. Medians of alternating runs, float32.
The columns `explicit`, `one axis` and `all axes` are the algorithm of `patch_moments.py` with lags of no axis, one axis
or all axes; a star marks what kfax chooses. "x" is how many times faster than im2col.
"""

import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from kfax._operations import Convolution, patch_moments, Windows  # noqa: E402


# n, height, width, channels, kernel, stride, groups
SHAPES = [
    (64, 16, 16, 64, 3, 1, 1),
    (64, 32, 32, 32, 3, 1, 1),
    (32, 8, 8, 128, 3, 1, 1),
    (16, 8, 8, 256, 3, 1, 1),
    (64, 16, 16, 32, 5, 1, 1),
    (64, 16, 16, 64, 3, 2, 1),
    (16, 64, 64, 3, 7, 2, 1),
    (64, 16, 16, 64, 3, 1, 64),
]


def im2col(convolution, x):
    rows = convolution._rows(x)
    rows = rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])
    return jnp.swapaxes(rows, -1, -2) @ rows


def choosing(lagged):
    """`input_moment` with lags of the given axes, or of those that kfax chooses."""

    def moment(convolution, x):
        chosen = patch_moments._choose_lagged
        if lagged is not None:
            patch_moments._choose_lagged = lambda axes, num_channels: lagged
        try:
            return convolution.input_moment(x, None, jnp.float32, diagonal=False)
        finally:
            patch_moments._choose_lagged = chosen

    return moment


def measure(candidates, convolution, x, repetitions):
    """By name: the median of milliseconds, and seconds to compile."""
    programs, seconds, compiling = {}, {name: [] for name in candidates}, {}
    for name, function in candidates.items():
        start = time.perf_counter()
        programs[name] = jax.jit(lambda x, f=function: f(convolution, x)).lower(x).compile()
        compiling[name] = time.perf_counter() - start
    reference = programs["im2col"](x)
    for name, program in programs.items():
        assert jnp.max(jnp.abs(program(x) - reference)) <= 1e-4 * jnp.max(jnp.abs(reference)), name
    for _ in range(repetitions):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x))
            seconds[name].append(time.perf_counter() - start)
    return {name: (1e3 * statistics.median(seconds[name]), compiling[name]) for name in candidates}


def main(repetitions=9):
    names = ["im2col", "explicit", "one axis", "all axes"]
    print(f"{'n x h x w x c, kernel / stride, groups':40}" + "".join(f"{name:>27}" for name in names))
    print(" " * 40 + f"{'ms (compile s)':>27}" + f"{'ms, x (compile s)':>27}" * 3)
    for n, height, width, channels, kernel, stride, groups in SHAPES:
        windows = Windows((kernel, kernel), (stride, stride), (1, 1), "SAME")
        convolution = Convolution(jnp.zeros((groups, channels // groups, kernel, kernel)), None, windows, groups)
        x = jax.random.normal(jax.random.key(0), (n, 1, channels, height, width))
        axes = windows.axes(x)[1]
        candidates = {"im2col": im2col, "explicit": choosing([])}
        if stride == 1:
            candidates["one axis"] = choosing([0])
            if kernel == 3:
                candidates["all axes"] = choosing([0, 1])
        chosen = names[1 + len(patch_moments._choose_lagged(axes, channels // groups))]
        results = measure(candidates, convolution, x, repetitions)
        line = f"{f'{n} x {height} x {width} x {channels}, {kernel} / {stride}, {groups}':40}"
        for name in names:
            if name not in results:
                line += f"{'-':>27}"
                continue
            milliseconds, compiling = results[name]
            ratio = "" if name == "im2col" else f"{results['im2col'][0] / milliseconds:6.2f}x"
            cell = f"{milliseconds:.1f}{ratio} ({compiling:.1f})"
            line += f"{cell + '*' * (name == chosen):>27}"
        print(line, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
