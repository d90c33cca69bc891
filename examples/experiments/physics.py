"""Train networks to solve an equation or to be a function, over many decades of loss.

`poisson` is a physics-informed network on a square, `ripples` a function on a line.
All points are seen in every step, so `lbfgs` is a baseline. `loss` and `error`, the
relative L2 error, are logarithms of base 10.

    python examples/experiments/physics.py --optimizers lbfgs adamw_b999 ggt
"""

import jax
from lab import command, fields


def main(argv: list[str] | None = None, run=command.run) -> None:
    parser = command.options(__doc__)
    add = parser.add_argument_group("problem and network").add_argument
    add("--problem", choices=fields.PROBLEMS, default="poisson")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--width", type=command.positive(int), default=24, help="(default: 24)")
    add("--layers", type=command.positive(int), default=2, help="(default: 2)")
    args = parser.parse_args(argv)
    with jax.enable_x64(args.dtype == "float64"):
        workload = fields.workload(args.problem, args.width, args.layers, args.dtype)
        run(parser, args, workload)


if __name__ == "__main__":
    main()
