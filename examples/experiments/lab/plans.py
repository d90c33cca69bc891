"""Plans: the optimizers of a comparison, by its name."""

COMPRESSED = ("sparse_mfac", "low_rank_mfac", "sparse_ggt", "low_rank_ggt")
GGT, MFAC = "sparse_ggt:metric=true", "sparse_mfac:metric=true"
LOW_RANK = "low_rank_ggt:metric=true,window_size=16"
MORE = f"{GGT},window_size=16,density={8 / 128}"
BYTES = "value_dtype=int8,error_dtype=int8"
HALF = "value_dtype=bfloat16,error_dtype=bfloat16"  # the default of sparse rows
WIDE = "value_dtype=float32,error_dtype=float32"
RELATIVE = "window_size=64,relative=true"
BASELINES = ("sgd", "adamw_b95", "adamw_b999", "muon", "psgd_kron")
AVERAGE = "b1=0.9,nesterov=true"


def published(settings, name):
    """Yield M-FAC or GGT with dense, sparse and low-rank rows, and without feedback."""
    sparse = f"sparse_{name}:{settings},density=0.01"
    yield f"{name}:{settings}"
    yield f"{sparse},block_size=4096"
    yield f"{sparse},block_size=128"
    yield f"{sparse},block_size=4096,error_feedback=false"
    yield f"low_rank_{name}:{settings},rank=4"


PLANS = {
    "comparison": [
        *("adamw_b95", "adamw_b999", "sgd", "muon"),
        *("mfac", "ggt", *COMPRESSED),
    ],
    "feedback": [
        *COMPRESSED,
        *(f"{name}:error_feedback=false" for name in COMPRESSED),
    ],
    # Six decades, in units of the window, and what a gradient's own unit does instead.
    "damping": [
        *(f"{MFAC},{RELATIVE},damping=1e{i}" for i in range(1, -6, -1)),
        *(f"{GGT},{RELATIVE},eps=1e{i}" for i in range(0, -7, -1)),
    ],
    "absolute": [
        *(f"sparse_mfac:damping=1e-{i}" for i in range(1, 7)),
        *(f"sparse_ggt:eps=1e-{i}" for i in range(1, 7)),
    ],
    "memory": [
        *("adamw_b95", "ggt"),
        *(f"sparse_ggt:window_size={m}" for m in (8, 16, 32, 64, 128)),
        *(f"low_rank_ggt:window_size={m},rank=1,{HALF}" for m in (8, 16, 32)),
    ],
    # With a window of one row GGT is a gradient of length one: what more rows give.
    "window": [
        *(f"{GGT},window_size={m}" for m in (1, 16, 64, 256, 1024)),
        *(f"{MFAC},window_size={m}" for m in (16, 64, 256, 1024)),
        *(f"sparse_ggt:metric=false,window_size={m}" for m in (1, 16, 64)),
    ],
    "compressors": [
        *(f"{GGT},window_size=16,density={k / 128}" for k in (1, 2, 8)),
        *(f"{GGT},window_size=16,block_size={b}" for b in (4096, 10**9)),
        *(f"{LOW_RANK},{HALF},rank={r}" for r in (1, 4, 16)),
    ],
    "density": [
        f"{name},window_size=64,block_size=4096,density={share}"
        for name in (GGT, MFAC)
        for share in (0.1, 0.01, 0.001)
    ],
    "dtypes": [
        *(f"{name},window_size=64" for name in (GGT, MFAC)),
        *(f"{name},window_size=64,{WIDE}" for name in (GGT, MFAC)),
        *(f"{LOW_RANK},{each}" for each in (HALF, WIDE)),
    ],
    "momentum": [
        *(f"ggt:metric=true,window_size=16,b1={b}" for b in (0, 0.5, 0.9)),
        *(f"ggt:metric=true,window_size=16,b1={b},nesterov=true" for b in (0.5, 0.9)),
        *(f"mfac:metric=true,window_size=16,b1={b}" for b in (0.5, 0.9)),
        *(f"{LOW_RANK},{HALF},{b}" for b in ("b1=0.5", "b1=0.9,nesterov=true")),
        *(f"{GGT},window_size=64,b1={b}" for b in (0.5, 0.9)),
        *(f"{name},window_size=64,momentum=0.9" for name in (GGT, MFAC)),
        "ggt:metric=true,window_size=16,momentum=0.9",
    ],
    # The published comparison of images, at the published settings and the library's.
    "paper": [
        *BASELINES,
        *published("window_size=256,damping=1e-4", "mfac"),
        *published("window_size=256,eps=1e-4", "ggt"),
        *("mfac", "ggt", *COMPRESSED),
        *(f"{name}:error_feedback=false" for name in COMPRESSED[::2]),
        *(f"{name}:metric=false" for name in COMPRESSED[::2]),
    ],
    # Without GGT, whose eigendecomposition of 1024 rows takes 77 ms of every step.
    "paper_1024": list(published("window_size=1024,damping=1e-4", "mfac")),
    # What of both networks of many layers have the time for.
    "paper_deep": [
        *(name for name in BASELINES if name != "adamw_b999"),
        *published("window_size=256,damping=1e-4", "mfac"),
        *published("window_size=256,eps=1e-4", "ggt"),
        *list(published("window_size=1024,damping=1e-4", "mfac"))[:2],
        *("sparse_mfac", "sparse_ggt", "sparse_ggt:metric=false"),
    ],
    # Losses that are the same in every step. Sparse rows take no average well.
    "physics": [
        *("lbfgs", *BASELINES[1:]),
        *("mfac", "ggt", *COMPRESSED),
        *(f"{name}:{AVERAGE}" for name in ("mfac", "ggt", *COMPRESSED)),
        *(f"{name}:{AVERAGE},density=0.25" for name in COMPRESSED[::2]),
        *(f"{name}:momentum=0.9" for name in ("mfac", "ggt")),
        *(f"{name}:{AVERAGE},metric=false,relative=true" for name in ("mfac", "ggt")),
        *(f"ggt:{AVERAGE},relative=true,eps=1e-{i}" for i in (1, 6)),
        *(f"{name}:{AVERAGE},window_size=256" for name in ("mfac", "ggt")),
    ],
    "recipes": [
        *("adamw_b95", "adamw_b999", "sgd", "muon"),
        *(f"{GGT},window_size={m}" for m in (16, 64)),
        *(f"{MFAC},window_size={m}" for m in (16, 64)),
        *(MORE, f"{MORE},{BYTES}"),
        *(f"{name}:metric=false,window_size=64" for name in COMPRESSED[::2]),
        *(f"{name}:metric=true,window_size=16" for name in ("ggt", "mfac")),
        *(f"{name}:metric=true,window_size=16,{HALF}" for name in COMPRESSED[1::2]),
        f"{GGT},window_size=64,error_feedback=false",
    ],
    # What a metric does for windows that are not sparse, at the rules' learning rates.
    "untuned": [
        f"{name}:{metric}window_size=16{dtypes}"
        for name, dtypes in (
            *(("ggt", ""), ("mfac", "")),
            *((name, f",{HALF}") for name in COMPRESSED[1::2]),
        )
        for metric in ("metric=false,", "metric=true,")
    ],
    "metric": [
        "adamw_b95",
        *(f"{name}:metric={on}" for on in ("false", "true") for name in COMPRESSED),
        *(f"{GGT},window_size={m}" for m in (8, 16)),
    ],
}
