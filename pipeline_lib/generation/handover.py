"""A policy's weights as files that another program loads: its adapter, or all of them.

Every version has a folder of its own, named by its content, so that the same weights are handed over once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft import LoraConfig, PeftModel, PeftType

from pipeline_lib.errors import ConfigError
from pipeline_lib.generation.contract import Policy
from pipeline_lib.hashing import sha256_bytes, sha256_file

_NAME_DIGITS = 16

Kind = Literal["adapter", "weights"]


@dataclass(frozen=True)
class Version:
    """Weights as files."""

    kind: Kind
    name: str
    """Differs where the content does."""
    directory: Path


@dataclass
class Handover:
    """Writes versions below one folder, and deletes those that are no longer needed."""

    place: Path
    """A folder that the other program can read under the same path."""
    is_shared: bool = False
    """True where the other program may see no other folder of ours."""
    _written: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def at(cls, place: str | None) -> Handover:
        """Take a folder; None: a new one among the machine's temporary files, which goes when this does."""
        if place is None:
            made = cls(Path(tempfile.mkdtemp(prefix="prefline-weights-")))
            weakref.finalize(made, shutil.rmtree, made.place, ignore_errors=True)
            return made
        directory = Path(place).expanduser().absolute()
        directory.mkdir(parents=True, exist_ok=True)
        return cls(directory, is_shared=True)

    def write(self, policy: Policy) -> Version:
        """Write what a policy is now.

        Raises:
            ConfigError: Its adapter is of a kind that the other program does not load.
        """
        require_transferable(policy)
        if not policy.is_trained:
            # Nobody writes to the folder any more, so it can be read where it is.
            if not self.is_shared:
                return Version("weights", name_of(policy.directory), policy.directory)
            return self._put("weights", lambda directory: _copy_model(policy.directory, directory))
        if isinstance(policy.adapter, PeftModel):
            adapter = policy.adapter
            return self._put("adapter", lambda directory: _save_adapter(adapter, policy.adapter_name, directory))
        model = policy.load()
        return self._put("weights", lambda directory: model.save_pretrained(directory))

    def forget(self, *, but: Version) -> None:
        """Delete all versions that were written here but one."""
        for name, directory in list(self._written.items()):
            if name != but.name:
                shutil.rmtree(directory)
                del self._written[name]

    def _put(self, kind: Kind, save: Callable[[Path], object]) -> Version:
        # A folder has its name only when it is whole: the other program never sees half of it.
        unfinished = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.place))
        try:
            save(unfinished)
            name = name_of(unfinished)
            directory = self.place / name
            if directory.is_dir():
                shutil.rmtree(unfinished)
            else:
                # The folder of `mkdtemp` is for its owner alone; a server may be another user.
                unfinished.chmod(0o755)
                os.replace(unfinished, directory)  # noqa: PTH105 - of a folder, as one step
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._written[name] = directory
        return Version(kind, name, directory)


def require_transferable(policy: Policy) -> None:
    """Refuse adapters that vLLM does not load.

    Raises:
        ConfigError: The policy has virtual tokens, IA3 or DoRA.
    """
    if policy.adapter is None:
        return
    found = type(policy.adapter).__name__
    if isinstance(policy.adapter, PeftModel):
        config = policy.adapter.peft_config[policy.adapter_name]
        if isinstance(config, LoraConfig) and not config.use_dora:
            return
        found = "DoRA" if isinstance(config, LoraConfig) else PeftType(config.peft_type).value
    raise ConfigError(
        f"generator 'vllm' cannot take a policy whose adapter is {found}",
        next_step="take adapter.name: lora without use_dora, adapter: null, or generator: {name: continuous}",
    )


def name_of(directory: Path) -> str:
    """Return a name for the weights of a folder, the same for the same content."""
    files = sorted(directory.glob("*.safetensors"))
    digests = "".join(f"{file.name} {sha256_file(file)}\n" for file in files)
    note = directory / "adapter_config.json"
    if note.exists():
        # The same matrices are another adapter under another scale.
        values = json.loads(note.read_bytes())
        digests += json.dumps([values.get(key) for key in ("r", "lora_alpha", "use_rslora")])
    return f"prefline-{sha256_bytes(digests.encode())[:_NAME_DIGITS]}"


def _save_adapter(adapter: PeftModel, name: str, directory: Path) -> None:
    """Write one of the adapters; other models may have theirs on the same base."""
    adapter.save_pretrained(str(directory), selected_adapters=[name])
    if (directory / name).is_dir():  # where peft puts all but the first
        for file in (directory / name).iterdir():
            os.replace(file, directory / file.name)  # noqa: PTH105 - as above
        (directory / name).rmdir()


def _copy_model(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json"):
            shutil.copyfile(file, target / file.name)
