"""Images and videos as they are found in the wild: what is read, and what is refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from ringworld_workers.data.files import DataError
from ringworld_workers.data.media import sample_media
from ringworld_workers.data.sampling import SampledFrame, Sampling

Maker = Callable[[Path], object]


def frames_of(path: Path, size: int = 8, **how: float) -> list[SampledFrame]:
    return list(sample_media(path, Sampling(**({"fps": 4.0} | how)), size))  # type: ignore[arg-type]


def write_film(path: Path, frames: int = 60, *, group: int = 10, **options: str) -> Path:
    """Frames of noise, ten a second, a key frame every ``group``; every byte matters."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": str(group), "bf": "0"})
        stream.width, stream.height = 48, 32
        for _ in range(frames):
            pixels = noise.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_songs(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_no_frame(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        container.start_encoding()


def write_small(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 2, 2, "bgr0"
        frame = av.VideoFrame.from_ndarray(np.zeros((2, 2, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_far_timestamp(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 48, 32
        for number in range(3):
            pixels = np.full((32, 48, 3), 60 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                packet.pts = packet.dts = (packet.pts or 0) + (10**8 if number == 2 else 0)
                container.mux(packet)


def write_claim(path: Path, width: int, height: int) -> None:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_noise(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def cut(make: Maker, share: float) -> Maker:
    """The first part of the file that another maker makes."""

    def make_cut(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return make_cut


def write_fast_start(path: Path) -> None:
    write_film(path, movflags="faststart")


def write_gigantic_film(path: Path) -> None:
    """A film that says it is of 9000 x 9000 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 9_000, 9_000, "rgb24"
        packet = av.Packet(bytes(99))
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        container.mux(packet)


BAD: list[tuple[str, Maker, str]] = [
    ("empty.mp4", lambda p: p.write_bytes(b""), "the file is empty"),
    ("text.mp4", lambda p: p.write_text("a film about words\n" * 99), "cannot be decoded at its"),
    ("text.jpg", lambda p: p.write_text("words"), "cannot be decoded at its start"),
    (
        "list.mp4",
        lambda p: p.write_text("ffconcat version 1.0\nfile film.mp4\n"),
        "holds no image or video of a format that is read",
    ),
    (
        "live.mp4",
        lambda p: p.write_text("#EXTM3U\n#EXTINF:9,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n"),
        "cannot be decoded at its start",
    ),
    ("songs.mp4", write_songs, "holds no video stream"),
    ("still.mkv", write_no_frame, "holds no frame"),
    ("dot.mkv", write_small, "2x2 pixels; each side needs at least 4"),
    ("dot.png", lambda p: Image.new("RGB", (1, 1)).save(p), "1x1 pixels; each side needs"),
    ("no-index.mp4", cut(write_film, 0.7), "cannot be decoded at its start: Invalid data"),
    ("cut.mp4", cut(write_fast_start, 0.97), r"breaks off at byte [\d,]+, before its last frame"),
    ("cut.mkv", cut(write_film, 0.6), r"breaks off at \d\.\d+ s of 6\.\d+ s"),
    ("far.mkv", write_far_timestamp, r"timestamp at [\d,]+ s; the limit is 172,800 s"),
    ("cut.jpg", cut(write_noise, 0.5), "cannot be decoded: image file is truncated"),
    ("head.jpg", cut(write_noise, 0.02), "cannot be decoded"),
    ("cut.png", cut(write_noise, 0.5), "cannot be decoded"),
    ("huge.png", lambda p: write_claim(p, 60_000, 60_000), "more than 67,108,864 pixels"),
    ("large.png", lambda p: write_claim(p, 9_000, 9_000), "9000x9000 pixels; the limit is 67,108"),
    ("short.png", lambda p: write_claim(p, 90, 90), "cannot be decoded"),
    ("huge.avi", write_gigantic_film, "9000x9000 pixels; the limit is 67,108,864 pixels"),
    (
        "depth.tiff",
        lambda p: Image.new("F", (8, 8)).save(p),
        "floating-point numbers without a scale",
    ),
]


@pytest.mark.parametrize(("name", "make", "says"), BAD, ids=[name for name, _, _ in BAD])
def test_what_cannot_be_used_is_refused_by_its_reason(
    tmp_path: Path, name: str, make: Maker, says: str
) -> None:
    make(tmp_path / name)
    for how in ({}, {"max_frames": 2}):
        with pytest.raises(DataError, match=says) as caught:
            frames_of(tmp_path / name, **how)
        assert str(tmp_path) not in str(caught.value)


def test_a_file_that_may_not_be_read_is_named_so(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            frames_of(tmp_path / "secret.png")
    finally:
        os.seteuid(user)


def test_a_suffix_says_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "photo.mp4", format="PNG")
    (frame,) = frames_of(tmp_path / "photo.mp4")
    assert frame.pixels[4, 4].tolist() == [9, 8, 7]
    write_film(tmp_path / "film.mkv", 3).rename(tmp_path / "film.jpg")
    assert len(frames_of(tmp_path / "film.jpg", fps=10)) == 3


def test_images_come_upright_on_white_in_eight_bits(tmp_path: Path) -> None:
    path = tmp_path / "any.png"
    halves = Image.new("RGB", (16, 16), "blue")
    halves.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the upper edge is shown at the right
    halves.save(path, exif=exif)
    (frame,) = frames_of(path)
    assert frame.pixels[4, [0, 7]].tolist() == [[0, 0, 255], [255, 0, 0]]
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    assert frames_of(path)[0].pixels.min() == 255
    Image.new("LA", (8, 8), (0, 51)).save(path)
    assert set(frames_of(path)[0].pixels.flat) == {204}
    Image.new("L", (8, 8), 77).save(path)
    assert set(frames_of(path)[0].pixels.flat) == {77}
    Image.fromarray(np.full((8, 8), 0x8123, np.uint16)).save(path)
    assert set(frames_of(path)[0].pixels.flat) == {0x81}
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(path)
    assert frames_of(path)[0].pixels[0, 0].tolist() == [10, 20, 30]
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert frames_of(tmp_path / "print.jpg")[0].pixels.min() >= 254
    with pytest.raises(DataError, match="a still image has no stretch"):
        frames_of(path, start=1.0)


def test_a_long_strip_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    # Scaled as a whole it would take 64 x 8,000,000 pixels.
    Image.new("L", (500_000, 4), 9).save(tmp_path / "strip.png")
    (frame,) = frames_of(tmp_path / "strip.png", size=64)
    assert frame.pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_film(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"dance.{suffix}"
    pictures = [Image.new("RGB", (16, 16), (0, 0, 80 * k)) for k in range(4)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=[500, 250, 0, 250], **lossless
    )
    frames = frames_of(path)
    # The third picture's delay of nothing is shown for 0.1 s, as browsers do.
    assert [frame.time for frame in frames] == [0.0, 0.25, 0.5, 0.75]
    assert [round(frame.pixels[..., 2].mean()) for frame in frames] == [0, 0, 80, 160]
    assert frames[3].shown == pytest.approx(0.75)
    fast = frames_of(path, fps=20, max_frames=3)
    assert [round(frame.pixels[..., 2].mean()) for frame in fast] == [0, 0, 240]
    with pytest.raises(DataError, match=r"starts at 3 s, but the video ends at 1\.1"):
        frames_of(path, start=3.0)


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 32
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :32] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    assert struct.unpack_from(">9i", content, matrix)[0] == 1 << 16
    # Turned clockwise by a quarter: the left half is then above.
    struct.pack_into(">9i", content, matrix, 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(content)
    (frame,) = frames_of(path)
    assert frame.pixels[0].min() > 200
    assert frame.pixels[-1].max() < 50


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """6 s of noise, a key frame a second."""
    yield write_film(tmp_path_factory.mktemp("film") / "film.mp4")


def same(frames: list[SampledFrame], others: list[SampledFrame]) -> None:
    assert [(f.time, f.shown) for f in frames] == [(f.time, f.shown) for f in others]
    for frame, other in zip(frames, others, strict=True):
        assert np.array_equal(frame.pixels, other.pixels)


def test_few_frames_are_spread_over_all_as_lwm_does(film: Path, tmp_path: Path) -> None:
    whole = frames_of(film)
    assert len(whole) == 24
    for number in (1, 2, 7, 23, 24, 99):
        kept = np.linspace(0, 23, number).astype(int) if number < 24 else range(24)
        same(frames_of(film, max_frames=number), [whole[i] for i in kept])
    # A rate is what somebody asks for: its moments are not listed.
    often = frames_of(film, max_frames=3, fps=1e12)
    assert [round(frame.shown, 2) for frame in often] == [0.0, 2.9, 5.9]
    # The same where a container has no index of key frames.
    other = write_film(tmp_path / "film.ts")
    whole = frames_of(other)
    same(frames_of(other, max_frames=5), [whole[i] for i in (0, 5, 11, 17, 23)])


def test_a_stretch_is_the_same_as_that_part_of_the_whole(film: Path) -> None:
    whole = frames_of(film)
    same(frames_of(film, start=2.5, end=4.0), whole[10:16])
    same(frames_of(film, start=5.0), whole[20:])
    # Captions are rounded to seconds; a second beyond the end is forgiven, two are not.
    same(frames_of(film, start=5.5, end=7.0), whole[22:])
    for start, end, says in ((5.5, 8.0, "ends at 8 s"), (6.1, 6.5, r"starts at 6\.1 s")):
        for limit in (None, 3):
            with pytest.raises(DataError, match=rf"stretch {says}, but the video ends at 6\.000 s"):
                frames_of(film, start=start, end=end, max_frames=limit)  # type: ignore[arg-type]


def test_what_lies_before_a_stretch_is_not_decoded(film: Path, tmp_path: Path) -> None:
    content = bytearray(film.read_bytes())
    start = content.index(b"mdat")
    for place in range(start + 2000, start + 4000, 7):
        content[place] ^= 0xFF
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="damaged|cannot be decoded"):
        frames_of(damaged)
    same(frames_of(damaged, start=4.0, end=5.5), frames_of(film, start=4.0, end=5.5))
