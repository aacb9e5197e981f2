"""What a mixture is made of, read and checked before anything is computed: LoRAs, whole components, the base itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from alignkit.adapters import lora, lora_files
from alignkit.adapters.fingerprint import fingerprint_of
from alignkit.adapters.lora_files import Stored
from alignkit.adapters.mixing import Lora, lora_ends, with_alphas
from alignkit.adapters.mixture import BASE, HERE, is_mixture, read_mixture
from alignkit.adapters.plain import require_loadable
from alignkit.adapters.tensor_files import StoredTensors
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import AdapterError, MissingFileError
from alignkit.generators.components import (
    component_class,
    is_computed,
    load_network,
    load_shapes,
    require_finite,
    require_weights,
    stored_dtype,
)
from alignkit.generators.folders import component_names, read_index, read_json, read_model_index
from alignkit.generators.lookup import family_of, local_folder
from alignkit.generators.table import origins
from alignkit.shipped import model_path
from alignkit.storage import checksum

if TYPE_CHECKING:
    from torch import nn

    from alignkit.generators.pipeline import PipelineGenerator

MIXABLE = ("text_encoder", "unet", "transformer")  # how the names of components begin that can be mixed
VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # T5's two names of one weight; files may have either
# Levels of CLIP and Qwen2.5-VL that files or loaded networks have, and what is left of them.
_LEVELS = {lora.TEXT_LEVEL: "", "model.language_model.": "model.", "model.visual.": "visual."}


@dataclass(frozen=True)
class Base:
    """The model that all members of a mixture were trained from; nothing is loaded before it is needed."""

    model: str
    folder: Path
    index: Mapping[str, Any]
    family: type[PipelineGenerator]
    _shapes: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def open(cls, model: str, family: str | None = None) -> Base:
        """A diffusers folder, hub id or `sandbox:NAME`. Raises MissingFileError, DataError and UnknownNameError."""
        named = model_path(model)
        chosen = family_of(read_index(named)["_class_name"], model, {}, family)
        folder = local_folder(named, chosen)
        index = read_model_index(folder, optional=chosen.optional_parts, unused=chosen.unused_parts)
        return cls(model, Path(folder), index, chosen)

    @property
    def components(self) -> list[str]:
        """The denoisers and text encoders."""
        names = component_names(self.index)
        return [name for name in names if name.startswith(MIXABLE) and self.index[name][0] is not None]

    @property
    def loadable(self) -> list[str]:
        """The components that the vanilla pipeline's `load_lora_weights` knows."""
        kind: Any = component_class("diffusers", self.index["_class_name"])
        return list(kind._lora_loadable_modules) if issubclass(kind, LoraBaseMixin) else []  # noqa: SLF001

    def shapes(self, component: str) -> nn.Module:
        """A component on the meta device: its layers without numbers."""
        if component not in self._shapes:
            self._shapes[component] = load_shapes(self.folder / component, *self.index[component])
        return self._shapes[component]

    def tensors(self, component: str) -> StoredTensors:
        """A component's weights on the disk."""
        return StoredTensors(require_weights(self.folder / component, self.index[component][0]).files)

    def has(self, folder: Path, component: str) -> bool:
        """Whether the weights in `folder` are byte by byte those of the component; reads both."""
        library = self.index[component][0]
        own = require_weights(self.folder / component, library).files
        other = require_weights(folder, library).files
        sizes = [file.stat().st_size for file in (*own, *other)]
        # A checksum reads the whole file, so sizes come first.
        return sizes[: len(own)] == sizes[len(own) :] and list(map(checksum, own)) == list(map(checksum, other))

    def fingerprint(self, component: str, dtype: torch.dtype | None = None) -> str:
        """`fingerprint.base_of` of a component that was loaded in `dtype`, by default in its files' precision.

        Reads one weight at a time where the files have the names that the loaded network has.
        """
        library, kind = self.index[component]
        stored = require_weights(self.folder / component, library)
        dtype = dtype or stored_dtype(stored)
        files = StoredTensors(stored.files)
        places = {plain_name(name): name for name in files}
        wanted = list(self.shapes(component).state_dict())
        if all(plain_name(name) in places for name in wanted):
            state: Mapping[str, torch.Tensor] = files.select({name: places[plain_name(name)] for name in wanted})
        else:
            network = component_class(library, kind)
            state = load_network(self.folder / component, network, stored, dtype).state_dict()
        return f"{str(dtype).removeprefix('torch.')}:{fingerprint_of([state], dtype)}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One thing that is mixed.

    name: as the user gave it; `base` is the base itself, which has neither LoRAs nor weights.
    loras: by component. weights: folders of whole components, by component.
    files: those that it was read from, by their path within it.
    bases: by component the fingerprint of the weights that it was trained from, where its files say so.
    window: the steps that it was trained for; None where its files do not say so.
    """

    name: str
    loras: Mapping[str, Stored] = field(default_factory=dict)
    weights: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    window: TunedSteps | None = None

    @property
    def components(self) -> list[str]:
        """The components that it changes."""
        return [*self.loras, *self.weights]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of its files, by their path within it; reads them."""
        return {name: checksum(file) for name, file in self.files.items()}

    def lora(self, component: str) -> Lora:
        """Its LoRA of a component, empty where it has none."""
        if component not in self.loras:
            return Lora({})
        stored = self.loras[component]
        return Lora.of(with_alphas(stored.weights, stored.config))


def read_member(name: str, base: Base) -> Member:
    """The member at `name`: a LoRA file or folder, a component's folder, a folder of components, or the word `base`.

    Its `alignkit.json`, where it has one, says what it was trained from. Raises MissingFileError where nothing is
    there; DataError for files that are damaged, not finite or changed; AdapterError naming the member for weights that
    are no plain LoRA, not finite, or of another family, shape or tokenizer than the base, and for a mixture that acts
    while sampling.
    """
    if name == BASE:
        return Member(name=name)
    path = Path(model_path(name))
    if not path.exists():
        raise MissingFileError(f"member '{name}' does not exist; give a LoRA, a folder of weights, or '{BASE}'")
    beside = path.parent if (path / "config.json").is_file() else path
    record = read_mixture(beside) if is_mixture(beside) else None
    acts_while_sampling = record is not None and record.space != "weights"
    if acts_while_sampling and [one.place for one in record.members] != [HERE]:
        raise AdapterError(f"member '{name}' is a mixture that acts while sampling; give the members of it")
    adapters = _adapter_files(path, base)
    if adapters:
        loras = _loras(path, base)
        bases = {component: stored.base for component, stored in loras.items()}
        return Member(name=name, loras=loras, files=adapters, bases=bases)
    folders = _components(path, base)
    files: dict[str, Path] = {}
    for component, folder in folders.items():
        _require_same_component(name, component, folder, base)
        stored = require_weights(folder, base.index[component][0])
        require_finite(stored)
        read = [*sorted(folder.glob("*.json")), *stored.files]
        files |= {f"{component}/{file.name}": file for file in read}
    bases = {} if record is None else {part: record.base_fingerprint.get(part, "") for part in folders}
    window = record.window if record is not None and acts_while_sampling else None
    return Member(name=name, weights=folders, files=files, bases=bases, window=window)


# --- LoRAs ----------------------------------------------------------------------------------------------------------


def _adapter_files(path: Path, base: Base) -> dict[str, Path]:
    """The files of a LoRA by their path in a folder that can be read again; none for other folders."""
    if path.is_file() or (path / lora.DIFFUSERS_FILE).is_file():
        return {lora.DIFFUSERS_FILE: path if path.is_file() else path / lora.DIFFUSERS_FILE}
    files = {}
    for place in ("", *(f"{component}/" for component in base.components)):
        for end in (lora.PEFT_FILE, lora.PEFT_CONFIG):
            if (path / f"{place}{lora.PEFT_FILE}").is_file() and (path / f"{place}{end}").is_file():
                files[f"{place}{end}"] = path / f"{place}{end}"
    return files


def _loras(path: Path, base: Base) -> dict[str, Stored]:
    parts = {component: base.shapes(component) for component in base.components}
    file, found = lora_files.read(path, parts, base.family.component, origins)
    lora_files.require_parts(file, found, parts, base.family.component, origins)
    for component, stored in found.items():
        where = f"'{file}'"
        require_loadable(stored.weights, stored.config, where)
        if lora_ends(stored.weights, where) is None:
            raise AdapterError(f"{where} holds no LoRA of {component}; its keys are those of no layout that is known")
        problem = _misfit(parts[component], Lora.of(stored.weights))
        if problem:
            made_for = lora_files.origin_of(found, origins())
            raise AdapterError(f"{where} does not fit '{base.model}': {problem}. It was made for {made_for}")
    return found


def _misfit(part: nn.Module, adapter: Lora) -> str | None:
    weights, kind = part.state_dict(), type(part).__name__
    for layer, (down, up, _) in adapter.layers.items():
        shape = [up.shape[0], *down.shape[1:]]
        if f"{layer}.weight" not in weights:
            return f"its {kind} has no layer '{layer}'"
        if list(weights[f"{layer}.weight"].shape) != shape:
            return f"'{layer}' of its {kind} is {list(weights[f'{layer}.weight'].shape)}, the LoRA is for {shape}"
    return None


def require_one_base(members: Sequence[Member], base: Base) -> dict[str, str]:
    """The fingerprints of the base's components that members change; reads the base's weights.

    Raises AdapterError naming the member whose file says that it was trained on other weights.
    """
    fingerprints = {}
    for component in dict.fromkeys(part for member in members for part in member.components):
        given = {member.name: member.bases[component] for member in members if component in member.bases}
        precisions = {name: vars(torch).get(whole.partition(":")[0]) for name, whole in given.items()}
        known = {name: dtype for name, dtype in precisions.items() if isinstance(dtype, torch.dtype)}
        own = {dtype: base.fingerprint(component, dtype) for dtype in set(known.values())}
        for name, dtype in known.items():
            if given[name] != own[dtype]:
                raise AdapterError(
                    f"'{name}' was trained on another base: the fingerprint of its {component} was {given[name]}, that "
                    f"of '{base.model}' is {own[dtype]}. Changes of different weights cannot be mixed; give the base "
                    "that it was trained on"
                )
        fingerprints[component] = next(iter(own.values()), "") or base.fingerprint(component)
    return fingerprints


# --- whole components -----------------------------------------------------------------------------------------------


def _components(path: Path, base: Base) -> dict[str, Path]:
    """The folders of the components that a member has of its own, by the base's name for them."""
    if (path / "config.json").is_file():
        return {_component_of(path, base): path}
    index = path / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") != base.index["_class_name"]:
        kind = read_json(index).get("_class_name")
        raise AdapterError(f"member '{path}' is a {kind}, '{base.model}' a {base.index['_class_name']}")
    found = {name: path / name for name in base.components if (path / name / "config.json").is_file()}
    if not found:
        raise MissingFileError(
            f"member '{path}' has neither a LoRA ({lora.DIFFUSERS_FILE}, {lora.PEFT_FILE}) nor a folder of any of "
            f"{', '.join(base.components)} with its config.json"
        )
    for name, folder in list(found.items()):
        if index.is_file() and len(found) > 1 and base.has(folder, name):
            del found[name]  # a whole pipeline of which another part was trained
    return found


def _component_of(path: Path, base: Base) -> str:
    if path.resolve().name in base.components:
        return path.resolve().name
    kind = _class_of(path)
    fitting = [name for name in base.components if _class_of(base.folder / name) == kind]
    if len(fitting) != 1:
        which = f"{len(fitting)} components of that class ({', '.join(fitting)})" if fitting else "no component of it"
        raise AdapterError(
            f"member '{path}' is a {kind}, and '{base.model}' has {which}; name its folder after the component that it "
            f"replaces: {', '.join(base.components)}"
        )
    return fitting[0]


def _class_of(folder: Path) -> str:
    config = read_json(folder / "config.json")
    return str(config.get("_class_name") or (config.get("architectures") or ["?"])[0])


def _require_same_component(name: str, component: str, folder: Path, base: Base) -> None:
    """AdapterError for another class, other weights' names or shapes, or another tokenizer."""
    kind, expected = _class_of(folder), _class_of(base.folder / component)
    if kind != expected:
        raise AdapterError(f"member '{name}': its {component} is a {kind}, that of '{base.model}' a {expected}")
    weights_of(folder, component, base)
    tokenizer = component.replace("text_encoder", "tokenizer")
    one, two = folder.parent / tokenizer, base.folder / tokenizer
    if component != tokenizer and one.is_dir() and two.is_dir():
        for file in VOCABULARIES:
            both = (one / file).is_file() and (two / file).is_file()
            if both and checksum(one / file) != checksum(two / file):
                raise AdapterError(
                    f"member '{name}': the tokenizer of its {component} differs from that of '{base.model}' "
                    f"('{one / file}'), so the encoders read other tokens and cannot be mixed"
                )
        if (one / "tokenizer.json").is_file() and (two / "tokenizer.json").is_file():
            words = [read_json(place / "tokenizer.json").get("model", {}).get("vocab") for place in (one, two)]
            if words[0] != words[1]:
                raise AdapterError(
                    f"member '{name}': the tokenizer of its {component} has another vocabulary than that of "
                    f"'{base.model}', so the encoders read other tokens and cannot be mixed"
                )


def weights_of(folder: Path, component: str, base: Base) -> StoredTensors:
    """A component's weights under the base's names for them.

    Levels of CLIP and Qwen2.5-VL, which versions of transformers have or have not, and T5's two names of its embedding
    count as the same. Raises AdapterError naming folder and weight for names or shapes that the base does not have.
    """
    own = StoredTensors(require_weights(folder, base.index[component][0]).files)
    theirs = base.tensors(component)
    by_plain: dict[str, str] = {}
    for name in own:
        first = by_plain.setdefault(plain_name(name), name)
        if first != name and not torch.equal(own[first], own[name]):  # two names of one weight
            raise AdapterError(f"'{folder}': '{first}' and '{name}' must be equal, they are one weight; save it again")
    names = {name: by_plain[plain_name(name)] for name in theirs if plain_name(name) in by_plain}
    missing = [name for name in theirs if name not in names and not is_computed(name)]
    wanted = set(map(plain_name, theirs))
    extra = [name for name in own if plain_name(name) not in wanted and not is_computed(name)]
    if not names or missing or extra:
        problem = f"it lacks '{missing[0]}'" if missing else f"'{extra[0]}' is none of its weights"
        raise AdapterError(f"'{folder}' does not fit the {component} of '{base.model}': {problem}")
    for name, stored in names.items():
        if own.layout(stored).shape != theirs.layout(name).shape:
            shapes = [list(own.layout(stored).shape), list(theirs.layout(name).shape)]
            raise AdapterError(
                f"'{folder}' does not fit the {component} of '{base.model}': '{stored}' has the shape {shapes[0]}, not "
                f"{shapes[1]}"
            )
    return own.select(names)


def plain_name(name: str) -> str:
    """A weight's name without what differs between files of one model."""
    for level, short in _LEVELS.items():
        if name.startswith(level):
            return short + name.removeprefix(level)
    return _TIED.get(name, name)


def renamed_layers(adapter: Lora, names: Sequence[str]) -> Lora:
    """A LoRA whose layers go by the names of weights in a file; see `weights_of`.

    Raises AdapterError for a layer that the file has no weight for.
    """
    places = {plain_name(name).removesuffix(".weight"): name.removesuffix(".weight") for name in names}
    layers = {}
    for path, layer in adapter.layers.items():
        plain = plain_name(path)
        if plain not in places:
            raise AdapterError(
                f"the base's files have no weight of the layer '{path}': they were written by another version of the "
                "library. Load the base and save it again"
            )
        layers[places[plain]] = layer
    return Lora(layers)
