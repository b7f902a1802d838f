"""What a user names becomes images and videos, or one clear line."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path

import av
import pytest
from PIL import Image
from videos import make_video, tone

from crowdexit.jobs.sources import SourceError, expand, kind_of
from crowdexit.video.container import VideoError, open_file


def write_wav(path: Path, samples: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * samples))
    return path


def names(sources) -> list[tuple[str, str]]:
    return [(s.path.name, s.kind) for s in sources]


def test_mixed_inputs_in_their_order(tmp_path, image_file):
    folder = tmp_path / "folder"
    for name in ("b.jpg", "a.JPG", "sub/deep.jpg", ".hidden.jpg"):
        image_file(f"folder/{name}")
    make_video(folder / "c.mp4", [0, 0.1])
    (folder / "notes.txt").write_text("not for counting")
    (folder / "heads.csv").write_text("x,y\n1,2\n")
    write_wav(folder / "alone.wav")
    last = image_file("z.jpg")
    film = make_video(tmp_path / "film.mkv", [0, 0.1])
    sources = expand([film, str(folder), last])
    assert names(sources) == [
        ("film.mkv", "video"),
        ("a.JPG", "image"),
        ("b.jpg", "image"),
        ("c.mp4", "video"),
        ("z.jpg", "image"),
    ]
    assert [s.named for s in sources] == [True, False, False, False, True]


def test_audio_file_beside_an_image(tmp_path, image_file):
    for name in ("a.jpg", "b.jpg"):
        image_file(name)
    make_video(tmp_path / "c.mp4", [0, 0.1])
    for name in ("a.wav", "c.wav"):
        write_wav(tmp_path / name)
    assert [s.audio for s in expand([tmp_path])] == [tmp_path / "a.wav", None, None]
    assert expand([tmp_path / "a.jpg"])[0].audio == tmp_path / "a.wav"


@pytest.mark.parametrize("suffix", [".WAV", ".Wav"])
def test_audio_suffix_is_case_insensitive(tmp_path, image_file, suffix):
    for name in ("a.JPG", "b.jpg"):
        image_file(name)
    audio = write_wav(tmp_path / f"a{suffix}")
    write_wav(tmp_path / "B.wav")
    assert [s.audio for s in expand([tmp_path])] == [audio, None]
    assert expand([tmp_path / "a.JPG"])[0].audio == audio


def test_without_a_known_suffix_the_contents_decide(tmp_path, image_file):
    shutil.copy(image_file("p.jpg"), tmp_path / "image")
    shutil.copy(make_video(tmp_path / "v.mp4", [0, 0.1]), tmp_path / "video.dat")
    assert kind_of(tmp_path / "image") == "image"
    assert kind_of(tmp_path / "video.dat") == "video"
    (tmp_path / "letters.txt").write_text("FFmpeg shows a text as a video of its letters\n" * 50)
    assert kind_of(tmp_path / "letters.txt") is None
    assert kind_of(write_wav(tmp_path / "s.wav")) is None
    write_wav(tmp_path / "s.wav").rename(tmp_path / "sound")
    assert kind_of(tmp_path / "sound") is None


def test_cover_art_does_not_make_audio_a_video(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = cover.disposition.attached_pic
        image = av.VideoFrame(32, 32, "yuvj420p")
        container.mux(cover.encode(image))
        container.mux(cover.encode())
        block = av.AudioFrame.from_ndarray(tone(1)[None], format="fltp", layout="mono")
        block.sample_rate = 16_000
        container.mux(audio.encode(block))
        container.mux(audio.encode())
    with av.open(str(path)) as container:
        assert [s.disposition.name for s in container.streams.video] == ["attached_pic"]
    assert kind_of(path) is None


def test_what_cannot_be_counted_is_said_in_one_line(tmp_path, image_file):
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-deeper").mkdir()
    image_file("only-deeper/sub/p.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "words.doc").write_text("words")
    for name, line in {
        "missing.jpg": "no such file or folder",
        "empty": "no image or video in this folder",
        "only-deeper": "no image or video in this folder",
        "empty.jpg": "the file is empty",
        "words.doc": "neither an image nor a video",
    }.items():
        with pytest.raises(SourceError) as caught:
            expand([image_file(), tmp_path / name])
        assert str(caught.value) == f"{tmp_path / name}: {line}"
    with pytest.raises(SourceError, match="nothing to count"):
        expand([])
    with pytest.raises(SourceError, match="an input without a name; for the current folder write"):
        expand([""])  # a shell variable that is not set


def test_a_file_is_what_its_contents_are_not_what_ffmpeg_finds_in_it(tmp_path, image_file):
    """A HEIC under a video's name, a JPEG in a PDF, a camera's preview, kinds that nothing here reads."""
    Image.new("RGB", (160, 96), "green").save(tmp_path / "phone.heic", "HEIF")
    (tmp_path / "phone.heic").rename(tmp_path / "phone.mov")
    jpeg = image_file("p.jpg").read_bytes()
    (tmp_path / "page").write_bytes(b"%PDF-1.4\n1 0 obj\n<< /Filter /DCTDecode >>\nstream\n" + jpeg + b"\nendstream")
    (tmp_path / "icon").write_bytes(b"\0\0\1\0\1\0\x40\x40\0\0\1\0\x20\0" + bytes(200))
    assert kind_of(tmp_path / "phone.mov") == "image"
    assert kind_of(tmp_path / "page") is None
    assert kind_of(tmp_path / "icon") is None
    for name in ("IMG_1.THM", "scan.pdf", "x.jxl", "a.psd"):  # refused by name when they are read
        assert kind_of(tmp_path / name) == "image"
    (tmp_path / "stream.mjpeg").write_bytes(jpeg * 3)
    assert kind_of(tmp_path / "stream.mjpeg") == "video"


def test_images_with_headers_between_them_are_refused_by_name(tmp_path):
    part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 3\r\n\r\n\xff\xd8\xff\r\n"
    (tmp_path / "camera.mjpeg").write_bytes(part * 5)
    with pytest.raises(VideoError, match=r"multipart.* not supported; convert it"):
        open_file(tmp_path / "camera.mjpeg")
