import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from classifier.labels import Degradation
from pipeline.degradations import (
    CameraNoise,
    DeepShadow,
    Haze,
    LowLight,
    MotionBlur,
    Noise,
    Rain,
    Recipe,
    apply,
)
from pipeline.point_spread import smooth_field
from pipeline.synthesis import damaged, draw_recipe

HEIGHT, WIDTH = 40, 56
LABELS = [label for label in Degradation if label not in (Degradation.CLEAN, Degradation.OTHER)]


def photographs(count: int) -> Tensor:
    """Scenes with bright smooth tops, B x 3 x H x W."""
    rng = np.random.default_rng(0)
    fields = [smooth_field(HEIGHT, WIDTH, rng, cells=5) for _ in range(3 * count)]
    scenes = torch.from_numpy(np.stack(fields)).view(count, 3, HEIGHT, WIDTH) * 0.8
    scenes[:, :, :12] = 0.95
    return scenes


def recipes(seed: int, per_label: int) -> list[Recipe]:
    """Of all kinds, mixed."""
    rng = np.random.default_rng(seed)
    drawn = [draw_recipe(label, rng, HEIGHT, WIDTH) for label in LABELS for _ in range(per_label)]
    drawn += [Rain.draw(rng, HEIGHT, WIDTH, downpours=True) for _ in range(per_label)]
    return [drawn[place] for place in rng.permutation(len(drawn))]


def test_a_batch_is_damaged_as_each_of_its_images_alone():
    mixed = recipes(1, 8)
    kinds = {type(recipe) for recipe in mixed}
    assert kinds == {Noise, CameraNoise, Rain, Haze, MotionBlur, LowLight, DeepShadow}
    images = photographs(len(mixed))
    before = images.clone()
    together = apply(images, mixed)
    assert torch.equal(images, before)
    for image, recipe, out in zip(images, mixed, together, strict=True):
        alone = damaged(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), recipe)
        np.testing.assert_allclose(out.permute(1, 2, 0).numpy(), alone, atol=2e-5, err_msg=str(recipe))


def test_a_recipe_travels_between_processes():
    mixed = recipes(2, 3)
    images = photographs(len(mixed))
    assert torch.equal(apply(images, mixed), apply(images, pickle.loads(pickle.dumps(mixed))))


def test_every_layer_of_rain_is_seen():
    dark = torch.zeros(1, 3, 120, 120)
    rng = np.random.default_rng(0)
    while len((rain := Rain.draw(rng, 120, 120)).layers) < 3:
        pass
    seen = [
        float(apply(dark, [Rain(rain.seed, rain.layers[:count], 0.0, 0.8)]).gt(0).float().mean()) for count in (1, 2, 3)
    ]
    assert 0 < seen[0] < seen[1] < seen[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_applies_what_a_cpu_does():
    rng = np.random.default_rng(3)
    # What has no random pixels, which every kind of device draws in its own way.
    drawn = [Haze.draw(rng, HEIGHT, WIDTH) for _ in range(6)]
    images = photographs(len(drawn))
    torch.testing.assert_close(apply(images.cuda(), drawn).cpu(), apply(images, drawn), atol=1e-4, rtol=0)
    mixed = recipes(4, 6)
    images = photographs(len(mixed))
    there, here = apply(images.cuda(), mixed).cpu(), apply(images, mixed)
    assert torch.isfinite(there).all()
    torch.testing.assert_close(there.mean(dim=(1, 2, 3)), here.mean(dim=(1, 2, 3)), atol=0.08, rtol=0)
