import numpy as np

from jobs.sheets import CAPTION_PX, GAP_PX, side_by_side


def test_pictures_stand_side_by_side_shrunk_to_the_cell() -> None:
    red = np.zeros((100, 200, 3), dtype=np.uint8)
    red[..., 0] = 255
    blue = np.zeros((50, 50, 3), dtype=np.uint8)
    blue[..., 2] = 255
    sheet = side_by_side([[("before", red), ("after", blue)]], cell_px=100)
    assert sheet.size == (100 + 50 + 3 * GAP_PX, 50 + CAPTION_PX + 2 * GAP_PX)
    assert sheet.getpixel((GAP_PX + 50, GAP_PX + CAPTION_PX + 25)) == (255, 0, 0)
    assert sheet.getpixel((2 * GAP_PX + 100 + 25, GAP_PX + CAPTION_PX + 25)) == (0, 0, 255)


def test_a_caption_that_is_wider_than_its_picture_is_whole() -> None:
    strip = np.full((60, 2, 3), 255, dtype=np.uint8)
    captions = ["kept as it is: abstained", "after, prompt lowlight"]
    narrow, wide = (
        np.asarray(
            side_by_side([[(caption, np.pad(strip, ((0, 0), (0, more), (0, 0)))) for caption in captions]], cell_px=400)
        )
        for more in (0, 398)
    )
    top = slice(0, GAP_PX + CAPTION_PX)
    assert (narrow[top] < 128).sum() == (wide[top] < 128).sum() > 0
