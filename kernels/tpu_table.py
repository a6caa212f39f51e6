"""Block sizes of the TPU kernels by generation and shape. Written by experiments/tune_tpu.py."""

BLOCKS = {
    "delta_rule": {
        "v4": {
            (64, 64): (8, 128, 1),
            (128, 128): (8, 128, 1),
        },
        "v5e": {
            (64, 64): (8, 128, 1),
            (128, 128): (8, 128, 1),
            (256, 256): (8, 128, 1),
        },
        "v5p": {
            (64, 64): (8, 128, 1),
            (128, 128): (8, 128, 1),
            (256, 256): (4, 128, 1),
        },
        "v6e": {
            (64, 64): (8, 128, 1),
            (128, 128): (8, 128, 1),
            (256, 256): (8, 128, 1),
        },
    },
    "lact_backward": {},
    "lact_forward": {},
}
