import numpy as np
import pytest
import torch

from models import transfer
from models.transfer import download, upload

CPU = torch.device("cpu")
IMAGES = [
    (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 7 % 251).astype(np.uint8),
    (np.arange(4 * 6 * 3).reshape(4, 6, 3) * 911 % 65_521).astype(np.uint16),
    np.linspace(0, 1, 3 * 8 * 3, dtype=np.float32).reshape(3, 8, 3),
]


@pytest.mark.parametrize("image", [*IMAGES, IMAGES[0][::-1, ::2]], ids=["uint8", "uint16", "float32", "a view"])
def test_an_image_comes_back_as_it_went(image):
    before = image.copy()
    there = upload([image], *image.shape[:2], CPU)
    (back,) = download(there)
    assert back.dtype == image.dtype
    np.testing.assert_array_equal(back, image)
    there.zero_()  # a copy
    np.testing.assert_array_equal(image, before)


def test_images_of_several_sizes_travel_mirrored_to_one():
    images = [np.full((2, 3, 3), 7, np.uint8), np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)]
    one, other = download(upload(images, 5, 4, CPU))
    assert (one == 7).all()
    np.testing.assert_array_equal(other[:4], images[1])
    np.testing.assert_array_equal(other[4], images[1][3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_images_come_back_from_a_gpu_as_they_went():
    rng = np.random.default_rng(0)
    device = torch.device("cuda")
    for _ in range(20):  # so that page-locked memory is used again
        images = [rng.integers(0, 256, (int(side), 300, 3), dtype=np.uint8) for side in rng.integers(1, 400, 8)]
        for image, back in zip(images, download(255 - upload(images, 400, 300, device)), strict=True):
            np.testing.assert_array_equal(back[: len(image)], 255 - image)


def test_without_page_locked_memory_plain_memory_is_taken(monkeypatch):
    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return whole(*args, **kwargs)

    whole = torch.empty
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match="no page-locked memory, copies are slower: CUDA error: out of memory"):
        assert transfer._room((2, 3), torch.uint8, torch.device("cuda")).shape == (2, 3)
