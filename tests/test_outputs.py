"""Names of outputs never collide; references are found by name."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.outputs import EXTENSIONS_BY_FORMAT, ReferenceIndex, reserved_names, restored_name
from pipeline.source import IMAGE_EXTENSIONS


def name(path, option="png", source="JPEG", output="PNG", others=()):
    return restored_name(path, source_format=source, output_format=output, option=option, taken=lambda p: p in others)


def test_same_format_keeps_the_name_whatever_the_extension_says():
    assert name("a/b.jpg", option="same", output="JPEG") == "a/b.jpg"
    assert name("a/b.jpg", option="same", source="PNG") == "a/b.jpg"


def test_another_format_appends_its_extension():
    assert name("a/b.jpg") == "a/b.jpg.png"
    assert name("b.png", option="jpeg", source="PNG", output="JPEG") == "b.png.jpg"
    assert name("b.PNG", source="PNG") == "b.PNG"
    assert name("b.jfif", option="jpeg", output="JPEG") == "b.jfif"
    assert name("b.tif", option="webp", source="TIFF", output="WEBP") == "b.tif.webp"


def test_format_that_cannot_be_written_back_appends_too():
    assert name("b.bmp", option="same", source="GIF") == "b.bmp.png"


def test_name_of_another_source_image_is_left_to_it():
    assert name("a.jpg", others={"a.jpg", "a.jpg.png"}) == "a.jpg.restored.png"
    assert name("a.jpg", others={"a.jpg.png", "a.jpg.restored.png"}) == "a.jpg.restored.restored.png"
    assert name("x", others={"x", "x.png", "x.restored"}) == "x.restored.restored.png"
    assert name("x.restored", others={"x", "x.png", "x.restored"}) == "x.restored.png"


extensions = st.sampled_from(sorted(IMAGE_EXTENSIONS | {".PNG", ".Jpg"}))
names = st.builds(
    lambda stem, parts: stem + "".join(parts),
    st.sampled_from(["a", "b", "d/a", "a.restored"]),
    st.lists(st.one_of(extensions, st.just(".restored")), max_size=3),
).flatmap(lambda stem: extensions.map(lambda extension: stem + extension))
formats = st.sampled_from(sorted(EXTENSIONS_BY_FORMAT))


@given(
    images=st.dictionaries(names, st.tuples(formats, st.booleans()), max_size=12),
    option=st.sampled_from(["same", "png", "jpeg", "webp"]),
)
def test_no_two_images_share_an_output_whichever_are_restored(images, option):
    outputs = []
    for path, (source, restored) in images.items():
        output = source if option == "same" else option.upper()
        outputs.append(name(path, option, source, output, images) if restored else path)
    assert len(set(outputs)) == len(outputs)


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_reference_is_found_by_path_without_extension(tmp_path):
    fill(tmp_path, "a/one.png", "a/two.jpg", "two.png", "notes.txt", "x.y.png")
    index = ReferenceIndex(tmp_path)
    assert index.find("a/one.jpg").path == tmp_path.resolve() / "a/one.png"
    assert index.find("a/two.jpg").path.name == "two.jpg"
    assert index.find("x.y.jpg").path.name == "x.y.png"
    assert index.find("one.jpg") is None
    assert index.find("x.jpg") is None
    assert index.find("notes.jpg") is None


def test_ambiguous_references_are_named_and_the_own_extension_wins(tmp_path):
    fill(tmp_path, "a.bmp", "a.png", "a.webp")
    index = ReferenceIndex(tmp_path)
    match = index.find("a.png")
    assert match.path.name == "a.png"
    assert [path.name for path in match.others] == ["a.bmp", "a.webp"]
    assert index.find("a.jpg").path.name == "a.bmp"


def test_missing_reference_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        ReferenceIndex(tmp_path / "none")


def test_references_of_one_beginning_are_told_apart(tmp_path):
    fill(tmp_path, "a.png", "a.b.png", "a.png.jpg", "a-b.png", "ab.png", "A.JPG")
    index = ReferenceIndex(tmp_path)
    found = {name: index.find(name).path.name for name in ("a.tif", "a.b.tif", "a.png.tif", "a-b.tif", "A.tif")}
    assert found == {
        "a.tif": "a.png", "a.b.tif": "a.b.png", "a.png.tif": "a.png.jpg", "a-b.tif": "a-b.png", "A.tif": "A.JPG",
    }  # fmt: skip
    assert index.find("a.tif").others == ()


def test_names_that_a_result_could_have_are_reserved() -> None:
    planned = [
        "a.jpg",
        "a.jpg.png",
        "b.png",
        "c.d/e.png",
        "x",
        "x.restored.restored.png",
        "y.restored",
        "y.restored.png",
    ]
    wanted = {"a.jpg.png", "x.restored.restored.png", "y.restored.png"}
    assert reserved_names(pa.chunked_array([planned[:3], planned[3:]])) == wanted
    assert reserved_names(pa.chunked_array([[]], pa.string())) == frozenset()
    assert reserved_names(pa.chunked_array([["deep/a", "deep/a.png", "b.png"]])) == {"deep/a.png"}
