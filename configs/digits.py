"""Handwritten digits, 32x32 in 4x8x8 latents, by flow matching (docs/objectives.md): minutes on two CPU cores.

    bash scripts/quickstart.sh

makes the data, extracts the latents, trains with this file, samples and scores. Result: see README.md. The same by the
released recipe: configs/digits_released.py.
"""

from configs import digits_released


def get_config():
    config = digits_released.get_config()
    config.update(schedule="linear", prediction="v", time_sampling="logit_normal")
    config.sample.scale = 4.0
    return config
