"""What the hardest small uploads take of memory on the page: ``python -m benchmarks.bench_memory``.

Each file is uploaded to a page of its own and counted there; the figure is the most that the page's process held beyond
what it held before, once it had counted a plain image. At most 1.5 GB is asked.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import uuid
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.cli.options import DEFAULT_MODEL

STREET = Path(__file__).parent.parent / "crowdexit" / "samples" / "street.jpg"
MOST_GB = 1.5


def flac_silence(path: Path, minutes: float) -> Path:
    """Stereo at 48 kHz, a few hundred kilobytes."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=48_000, layout="stereo")
        second = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48_000), np.int16), "s16", "stereo")
        second.rate = 48_000
        for number in range(int(60 * minutes)):
            second.pts = number * 48_000
            file.mux(stream.encode(second))
        file.mux(stream.encode(None))
    return path


def flat_image(path: Path, side: int) -> Path:
    """One colour: as PNG a few hundred kilobytes."""
    cv2.imwrite(str(path), np.full((side, side, 3), 90, np.uint8))
    return path


class Page:
    """A page in a process of its own."""

    def __init__(self, model: str) -> None:
        program = "import sys; from app.page import launch; launch(sys.argv[1], port=int(sys.argv[2]))"
        self.port = _free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, model, str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("CrowdExit is at"):
            raise SystemExit("the page did not start")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()

    def count(self, image: Path, audio: Path | None = None) -> str:
        """Upload, count, and wait for the end; what the page said last."""
        config = json.loads(self._run_exit("GET", "/config"))
        number = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) >= 3)
        inputs = next(d["inputs"] for d in config["dependencies"] if d["id"] == number)
        data = [self._upload(image), None if audio is None else self._upload(audio), True]
        data += [DEFAULT_MODEL] * (len(inputs) - 3)
        session = uuid.uuid4().hex
        call = json.dumps({"fn_index": number, "data": data, "session_hash": session}).encode()
        self._run_exit("POST", "/gradio_api/queue/join", call, "application/json")
        return self._run_exit("GET", f"/gradio_api/queue/data?session_hash={session}")

    def peak_bytes(self) -> int:
        """The most that the process has held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return 1024 * int(found[1])

    def held_bytes(self) -> int:
        """What the process holds now."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    def _upload(self, path: Path) -> dict[str, Any]:
        head = f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + b"\r\n--cut--\r\n"
        (there,) = json.loads(self._run_exit("POST", "/gradio_api/upload", body, "multipart/form-data; boundary=cut"))
        return {"path": there, "meta": {"_type": "gradio.FileData"}}

    def _run_exit(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise SystemExit(f"{method} {path}: {response.status} {text[:200]}")
        return text


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--minutes", type=float, default=46, help="of silence")
    parser.add_argument("--side", type=int, default=12_000, help="of the image, in pixels")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": describe(), "uploads": {}}
    print(f"{args.model}; {in_a_line(figures['machine'])}")
    with tempfile.TemporaryDirectory() as folder:
        silence = flac_silence(Path(folder) / "silence.flac", args.minutes)
        image = flat_image(Path(folder) / "flat.png", args.side)
        jpeg = Path(folder) / "flat.jpg"
        cv2.imwrite(str(jpeg), np.full((args.side, args.side, 3), 90, np.uint8))
        for name, files in {
            f"{args.minutes:g} minutes of FLAC": (STREET, silence),
            f"PNG {args.side}×{args.side}": (image, None),
            f"JPEG {args.side}×{args.side}": (jpeg, None),
        }.items():
            page = Page(args.model)
            page.count(STREET)
            idle = page.held_bytes()
            said = page.count(*files)
            taken, kept = page.peak_bytes() - idle, page.held_bytes() - idle
            page.close()
            kilobytes = sum(file.stat().st_size for file in files if file is not None) // 1000
            counted = "people" in said or "Nobody" in said
            figures["uploads"][name] = {"kilobytes": kilobytes, "taken": taken, "kept": kept, "counted": counted}
            verdict = "" if taken <= MOST_GB * 1e9 else f"  more than {MOST_GB} GB"
            print(f"{name:24} {kilobytes:6} kB  {taken / 1e9:5.2f} GB at most, {kept / 1e9:5.2f} after{verdict}")
    keep(figures, args.json)


if __name__ == "__main__":
    main()
