"""ghm-jax: train, evaluate and inspect GHM detectors.

    ghm-jax train experiments/quickstart.py [--run-dir DIR] [--loss.mu 0.05 ...]
    ghm-jax evaluate runs/quickstart [--split validation] [--evaluator pycocotools]
    ghm-jax evaluate|stats|predict|export RUN ... --data.dir DIR     (a run whose data was moved)
    ghm-jax evaluate RUN_OR_EXPERIMENT --detections FILE.json [--out DIR] [--annotations FILE.json]
    ghm-jax predict runs/quickstart IMAGE_OR_FOLDER... --out DIR [--threshold 0.3] [--batch-size N]
    ghm-jax import WEIGHTS EXPERIMENT [--run-dir DIR] [--data.dir data ...]
    ghm-jax export runs/quickstart --out FILE.stablehlo [--size HEIGHT WIDTH] [--batch-size N]
    ghm-jax export RUN --out FILE.safetensors
    ghm-jax stats runs/quickstart [--out DIR] [--split train] [--images 500]
    ghm-jax doctor [RUN or EXPERIMENT] [--data.dir data]
    ghm-jax describe experiments/coco_r50_ghm.py [--size HEIGHT WIDTH] [--classes N]
    ghm-jax data prepare coco/2017 --source DIR --out data
    ghm-jax data prepare folder --name mine --out data --train IMAGES JSON --validation IMAGES JSON
    ghm-jax data inspect EXPERIMENT [--out DIR] [--batches 20] [--data.dir data ...]
    ghm-jax bench losses|data|train|inference [--out FILE.json]

`ghm-jax train EXPERIMENT --help` lists every setting.
"""

# Thin calls of the package: argv, prints and exits are in this folder alone.

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence

try:
    from ghm_jax.cli import (
        bench,
        data,
        describe,
        doctor,
        evaluate,
        export,
        import_weights,
        predict,
        stats,
        train,
    )
    from ghm_jax.cli.arguments import Arguments
    from ghm_jax.cli.messages import fail, one_line
    from ghm_jax.exceptions import StoppedElsewhere, UserError
except ModuleNotFoundError as missing:
    sys.exit(
        f"ghm-jax: {missing}; the detector needs more than the losses: "
        'pip install "ghm-jax[detector]"'
    )

_COMMANDS: dict[str, Callable[[Arguments], None]] = {
    "train": train.train_command,
    "evaluate": evaluate.evaluate_command,
    "predict": predict.predict_command,
    "import": import_weights.import_command,
    "export": export.export_command,
    "describe": describe.describe_command,
    "stats": stats.stats_command,
    "doctor": doctor.doctor_command,
    "data prepare folder": data.prepare_folder_command,
    "data prepare coco/2017": data.prepare_coco_command("2017"),
    "data prepare coco/2014": data.prepare_coco_command("2014"),
    "data inspect": data.inspect_command,
    "bench losses": bench.losses_command,
    "bench data": bench.data_command,
    "bench train": bench.train_command,
    "bench inference": bench.inference_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 0, with 1 after a one-line error, or with 130 if interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may not know every character of a class name; stderr replaces them anyway.
        sys.stdout.reconfigure(errors="replace")
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except StoppedElsewhere:
        fail(None)
    except UserError as error:
        fail(one_line(error))
    except BrokenPipeError:  # the reader has closed the pipe, as in `ghm-jax ... | head`
        # Otherwise Python would fail again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:  # not about a file that the user could do something about
            raise
        fail(str(error))
    except RuntimeError as error:  # JAX raises a subclass, which need not be imported here
        said = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        fail(
            f"out of memory ({said.rpartition('RESOURCE_EXHAUSTED: ')[2]}); raise "
            "--optimizer.accumulate, lower --optimizer.batch-size (in evaluation "
            "--predict.batch-size) or use smaller --data.buckets"
        )
    except KeyboardInterrupt:
        print("\nghm-jax: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(args: list[str]) -> None:
    # Without a home directory it warns at length that its cache of fonts is a temporary one.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for name in ("gcsfs", "google"):  # what fails is one line of ours
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Without this, JAX logs why it found no accelerators on a machine that has none.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command = next((n for n in (3, 2, 1) if " ".join(args[:n]) in _COMMANDS), 0)
    if not command:
        wanted = " ".join(a for a in args if a not in ("-h", "--help"))
        only_help = not args or args[-1] in ("-h", "--help")
        if not only_help or not any(f"{c} ".startswith(wanted) for c in _COMMANDS):
            fail(f"unknown command {wanted!r}; choose from {', '.join(_COMMANDS)}")
        print(__doc__)
        return
    _COMMANDS[" ".join(args[:command])](Arguments.split(args[command:]))
