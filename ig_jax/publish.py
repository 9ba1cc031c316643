"""Networks onto the Hugging Face hub, with a model card that carries recipe, guidance and scores;
`ig_jax.from_pretrained` reads them back."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from ig_jax import fields, hub, recipes
from ig_jax.convert.pytorch import to_pytorch
from ig_jax.convert.workdir import config_for, load_workdir
from ig_jax.diffusion.guidance import Guidance
from ig_jax.errors import InputError
from ig_jax.models.dit import DiT, DiTSpec
from ig_jax.paths import resolve
from ig_jax.sampling.sample import check_kinds
from ig_jax.sections import Config
from ig_jax.storage import weight_files
from ig_jax.storage.checkpoints import saved_config

_SECTIONS = ("model", "data", "loss", "optimizer", "train", "sampler")


def push_to_hub(
    model: DiT | str | os.PathLike[str],
    repository: str,
    *,
    guidance: Guidance | None = None,
    scores: Mapping[str, float] | None = None,
    private: bool = False,
) -> str:
    """Publishes a network on the Hugging Face hub, to be read with `from_pretrained`.

    What is there afterwards: the weights under PyTorch's names (`model.safetensors`), the
    architecture, recipe, guidance and scores (`config.json`), and a model card that shows them.
    Needs the extra `hub` and a login (`hf auth login`). No path of this machine is published.

    Args:
        model: a SiT, DiT or LightningDiT, or a workdir, whose last EMA weights are taken and whose
            config is the recipe. A network's recipe is that of its family.
        repository: hub id, "user/name"; made if there is none.
        guidance: the setting recommended for sampling; none by default.
        scores: results by name, such as {"FID": 1.75}, with that guidance.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        InputError: an argument of another kind; a guidance that the network cannot have, or by a
            weaker network, which would have to be published, too; no `huggingface_hub`, network,
            login, or right to write there.
    """
    client = _client(repository)
    if isinstance(model, str | os.PathLike):
        config = saved_config(os.fspath(model))
        model = load_workdir(os.fspath(model))
    else:
        config = None
    guidance = Guidance() if guidance is None else guidance
    check_kinds(model, guidance, None)
    if not isinstance(model, DiT):
        raise InputError(f"model is a {type(model).__name__}: expected a SiT, DiT or LightningDiT")
    guidance.check(len(model.spec.auxiliary_depths), model.spec.num_classes)
    _check_scores(scores or {})
    content = _describe(model.spec, config or config_for(model.spec), guidance, scores or {})
    with tempfile.TemporaryDirectory() as folder:
        weight_files.write_safetensors(f"{folder}/{hub.WEIGHTS}", to_pytorch(model))
        (resolve(folder) / hub.CONFIG).write_text(json.dumps(content, indent=1) + "\n")
        (resolve(folder) / "README.md").write_text(_card(repository, model.spec, content))
        try:
            client.HfApi().create_repo(repository, private=private, exist_ok=True)
            commit = client.HfApi().upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"{model.spec.summary}"
            )
        except Exception as error:  # the HTTP library underneath differs between versions
            raise InputError(
                f"{repository}: cannot be published ({hub.first_line(error)}); expected a login "
                "(`hf auth login`) with the right to write there"
            ) from error
    return str(commit.commit_url)


def _client(repository: str) -> Any:
    """`huggingface_hub`, once it can be of use."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError('publishing needs huggingface_hub: pip install "ig_jax[hub]"') from error
    if not isinstance(repository, str) or repository.count("/") != 1:
        raise InputError(f"repository is {repository!r}: expected 'user/name'")
    reason = hub.offline()
    if reason is not None:
        raise InputError(f"{repository}: cannot be published ({reason}); expected a network")
    return huggingface_hub


def _check_scores(scores: Mapping[str, float]) -> None:
    if not isinstance(scores, Mapping):
        raise InputError(f"scores is {scores!r}: expected numbers by name, such as {{'FID': 1.75}}")
    for name, value in scores.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(f"score {name} is {value!r}: expected a finite number")


def _describe(
    spec: DiTSpec, config: ConfigDict, guidance: Guidance, scores: Mapping[str, float]
) -> dict[str, Any]:
    """The content of `config.json`."""
    terms = guidance.record()
    if any(term["source"] == "weaker" for term in terms):
        raise InputError("guidance by a weaker network: expected one that needs this network alone")
    known = fields.sections(Config)
    recipe = {
        section: {
            name: value
            for name, value in config[section].items()
            if name in fields.declared(known[section])
            and not fields.declared(known[section])[name].path
        }
        for section in _SECTIONS
    }
    return {
        "library": "ig_jax",
        "spec": dataclasses.asdict(spec),
        "autoencoder": config.data.autoencoder,
        "guidance": terms,
        "scores": {name: float(value) for name, value in scores.items()},
        "recipe": recipe,
    }


_CARD = """
# {name}

{summary} with [Internal Guidance](https://arxiv.org/abs/2512.24176): {classes}, input {shape},
auxiliary heads after blocks {depths}. Written by `ig_jax.push_to_hub`.

```python
import ig_jax  # pip install "ig_jax[hub]"

loaded = ig_jax.from_pretrained("{name}")
pictures = ig_jax.sample(
    loaded.model, {labels}, guidance=loaded.published.guidance, decoder=loaded.decoder{options}
)
```

## Guidance

{guidance}

## Scores

{scores}

## Recipe

{recipe}
"""


def _card(repository: str, spec: DiTSpec, content: Mapping[str, Any]) -> str:
    """The model card: its metadata, which the hub shows and searches, and what people read."""
    import huggingface_hub

    scores, recipe = content["scores"], content["recipe"]
    data = recipe["data"]
    results = [
        huggingface_hub.EvalResult(
            task_type="image-generation",
            dataset_type=data["name"],
            dataset_name=data["tfds_name"] or data["name"],
            metric_type=name.lower(),
            metric_name=name,
            metric_value=value,
        )
        for name, value in scores.items()
    ]
    metadata = huggingface_hub.ModelCardData(
        library_name="ig_jax",
        tags=["jax", "diffusion", "internal-guidance", spec.family],
        model_name=repository.partition("/")[2],
        eval_results=results or None,
    )
    own = recipes.family(spec.family).config["loss"]
    differing = {
        k: recipe["loss"][k] for k in ("path", "prediction") if recipe["loss"][k] != own[k]
    }
    labels = list(range(min(spec.num_classes, 3))) if spec.num_classes else [0, 0, 0]
    trained = [
        (f"{section}.{name}", value)
        for section, values in recipe.items()
        for name, value in values.items()
    ]
    text = _CARD.format(
        name=repository,
        summary=spec.summary,
        classes=f"{spec.num_classes} classes" if spec.num_classes else "unconditional",
        shape="×".join(map(str, spec.shape)),
        depths=", ".join(map(str, spec.auxiliary_depths)) or "none",
        labels=labels,
        options="".join(f", {name}={value!r}" for name, value in differing.items()),
        guidance="\n".join(f"- {_term(term)}" for term in content["guidance"]) or "None.",
        scores=_table(("score", "with this guidance"), scores.items()),
        recipe=_table(("field", "value"), trained),
    )
    return f"---\n{metadata.to_yaml()}\n---\n{text}"


def _term(record: Mapping[str, Any]) -> str:
    """A term of guidance in a line: "auxiliary, scale 1.4, linear, interval(low=0.3)"."""
    rest = (f"{k} {v}" for k, v in record.items() if k not in ("source", "scale", "rule"))
    return ", ".join([record["source"], f"scale {record['scale']:g}", record["rule"], *rest])


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines]) if lines else "None."
