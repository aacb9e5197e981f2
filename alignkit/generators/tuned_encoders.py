"""A folder of tuned text encoders: `NAME/` as a pipeline's component, and `alignkit.json`, which says how to use them.

The record is that of a mixture of embeddings (`alignkit.adapters.mixture`) whose one member, of weight 1, is the folder
itself. Its fingerprints are those of the encoders that were tuned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.adapters import comfyui, exports, lora
from alignkit.adapters.fingerprint import base_of, is_other_base
from alignkit.adapters.mixture import FILE, HERE, MemberRecord, Mixture, is_mixture, read_mixture, write_mixture
from alignkit.diffusion.tuned_steps import ALL_STEPS
from alignkit.errors import AdapterError, ConfigError, MissingFileError, UnknownNameError, nearest
from alignkit.escape import get_logger
from alignkit.generators.components import load_network, require_finite, require_weights
from alignkit.storage import checksum

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator

logger = get_logger(__name__)


def save_tuned(generator: PipelineGenerator, folder: Path) -> None:
    """Write the trained encoders of `generator` into `folder`, adapters merged, with the window of its conditioner.

    Where the encoders carry adapters, those that the pipeline's LoRA loader reads are in `folder/lora` too, and all of
    them in `folder/comfyui` if ComfyUI has keys for them; such a file acts in all steps. Logs a warning for an encoder
    whose adapter such a file cannot hold. Raises AdapterError if none is trained.
    """
    conditioner = generator.conditioner
    written = conditioner.save(folder)
    files = {f"{part.name}/{file.name}": checksum(file) for part in written for file in sorted(part.iterdir())}
    bases = {part.name: base_of(conditioner.base(part.name)) for part in written}
    record = Mixture(
        space="embedding",
        base=str(generator.pipeline.name_or_path),
        base_fingerprint=bases,
        members=(MemberRecord(name="tuned", files=files, place=HERE),),
        weights=(1.0,),
        window=conditioner.window or ALL_STEPS,
    )
    write_mixture(folder, record)
    _save_adapters(generator, folder, bases)


def _save_adapters(generator: PipelineGenerator, folder: Path, bases: dict[str, str]) -> None:
    """The encoders' adapters for other programs; a warning for each encoder whose adapter these cannot read."""
    conditioner = generator.conditioner
    adapted: dict[str, Any] = {}
    readable: dict[str, Any] = {}  # by the pipeline's LoRA loader
    for name, part in conditioner.trained.items():
        if not lora.lora_layers(part):
            continue
        if conditioner.base(name) is not part:
            place, reason = (
                "'lora' or 'comfyui'",
                "its LoRA is a change of the encoder that was given, not of the model's own",
            )
        elif name in generator.lora_encoders:
            adapted[name] = readable[name] = part
            continue
        else:
            adapted[name] = part
            loader = type(generator.pipeline).__name__
            place, reason = "'lora'", f"the LoRA loader of a {loader} does not read a LoRA of it"
            if not generator.comfyui:
                place, reason = "'lora' or 'comfyui'", f"{reason}, and ComfyUI's keys for such a model are not known"
        logger.warning("no file in %s of '%s' holds %s: %s; use '%s'", place, folder, name, reason, folder / name)
    if readable:
        exports.export_diffusers(readable, folder / "lora", bases=bases)
    if adapted and generator.comfyui:
        comfyui.export(adapted, folder / "comfyui" / f"{Path(generator.name).name}.safetensors", {}, bases=bases)


def load_tuned(generator: PipelineGenerator, folder: Path) -> None:
    """Put the encoders of `folder` into `generator`, frozen; its own become the reference.

    Encoders that were tuned from other base weights are loaded with a warning. Raises MissingFileError, DataError for
    files that are damaged, changed or hold NaN, UnknownNameError and AdapterError for encoders that are none of this
    model, ConfigError for a weight other than 1.
    """
    if not is_mixture(folder):
        raise MissingFileError(f"'{folder}' holds no tuned text encoders: {FILE} is missing")
    record, present = read_mixture(folder), generator.conditioner.encoders
    if record.space != "embedding" or [member.place for member in record.members] != [HERE]:
        raise AdapterError(f"'{folder}' is a mixture of {len(record.members)} members; give it as `adapter`")
    parts: dict[str, Any] = {}
    for name, base in record.base_fingerprint.items():
        if name not in present:
            advice = f"this model has {list(present)}.{nearest(name, present)}"
            raise UnknownNameError(f"'{folder}' holds a text encoder '{name}'; {advice}")
        own: Any = present[name]
        if is_other_base(own, base):
            logger.warning("'%s' was tuned from another %s (%s) than that of '%s'", folder, name, base, generator.name)
        stored = require_weights(folder / name, "transformers")
        require_finite(stored)
        parts[name] = load_network(folder / name, type(own), stored, own.dtype)
    if record.weights != (1.0,):
        raise ConfigError(f"'{folder / FILE}': tuned text encoders have weight 1, not {list(record.weights)}")
    generator.conditioner.put(parts, record.window)
    generator.conditioner.folder = folder
