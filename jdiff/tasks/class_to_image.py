"""Labels to pictures, or to latents: a DiT under a Gaussian diffusion or flow matching."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from PIL import Image

from jdiff import models, tree
from jdiff.data import Source
from jdiff.diffusion.process import Process, make_process
from jdiff.evaluate.samples import Samples, of_pipeline
from jdiff.loading import DTYPES
from jdiff.pipelines import ClassPipeline, from_uint8, grid
from jdiff.tasks import NOTHING, Losses, LossFn, mean_gradient, open_source, use_given
from jdiff.tasks.parts import open_base, part_of


def class_loss(model: Any, process: Process) -> LossFn:
    """The loss of a class-conditional model on batches of `image` (uint8) or `latent`, and `label`; the tree is {"dit": …}."""

    def loss(params: Any, batch: Mapping[str, jax.Array], keys_B: jax.Array) -> Losses:
        x_0_BHWC = batch["latent"] if "latent" in batch else from_uint8(batch["image"])
        keys_B2 = jax.vmap(jax.random.split)(keys_B)
        y_B = batch["label"]
        if model.null_label is not None:
            drop_B = jax.vmap(jax.random.uniform)(keys_B2[:, 0]) < model.label_dropout
            y_B = jnp.where(drop_B, model.null_label, y_B)
        model_fn = lambda x_BHWC, t_B: model.apply({"params": params["dit"]}, x_BHWC, t_B, y_B)  # noqa: E731
        return process.losses(model_fn, x_0_BHWC, keys_B2[:, 1])

    return loss


class ClassToImage:
    """See `jdiff.tasks.Task`."""

    transform = None
    base = NOTHING
    adaptable = ("dit",)

    def __init__(self, config: Any, mesh: Mesh, workdir: Path | None = None):
        self.config, self.title = config, config.model.name
        # before a long listing: all that can be said of the model without the pictures' size, for which 0 stands
        fields = {key: value for key, value in config.model.items() if key != "name" and value is not None}
        named = models.create(config.model.name, image_size=0, **fields)
        if config.sample.guidance != 1 and named.null_label is None:
            raise ValueError(
                f"sample.guidance={config.sample.guidance} needs an unconditional label, and model.label_dropout=0 has none: "
                "use --config.sample.guidance=1"
            )
        self.source = self.open_source()
        size, _, channels = self.source.shape
        shape = {"image_size": size, "channels": channels, "num_classes": self.source.num_classes}
        self.model = models.create(config.model.name, **shape, dtype=DTYPES[config.precision], **fields)
        self.main, self.frozen = ("dit", self.model), f"dit/({self.model.frozen})"
        process = make_process(config.diffusion, self.model.learn_sigma)
        self.loss = class_loss(self.model, process)
        self.gradient = mean_gradient(self.loss)
        preview, names = getattr(self.source, "preview", None), self.source.class_names
        self.pipe = ClassPipeline(self.model, None, process, mesh=mesh, class_names=names, preview=preview)

    def open_source(self) -> Source:
        """Where records come from."""
        return open_source(self.config)

    def given(self) -> Any:
        """The weights of init_from, in float32. ValueError when it holds another model."""
        path = self.config.init_from
        if path is None:
            return {}
        part = part_of(open_base(self.config), "dit", f"init_from={path}")
        same = {"remat", "scan_layers"}  # how it is run
        if not self.config.lora.rank:
            same.add("image_size")  # another has other positions, which no training changes
        theirs, ours = (
            {key: value for key, value in models.describe(model).items() if key not in same}
            for model in (part.module, self.model)
        )
        if wrong := [
            f"{key} {theirs.get(key)}, not {value}" for key, value in ours.items() if theirs.get(key) != value
        ]:
            raise ValueError(
                f"init_from={path} holds another model than model.* and the data ask for: {', '.join(wrong)}"
            )
        params = part.weights()
        if part.module.image_size != self.model.image_size:
            params, _ = tree.set_apart(params, self.model.frozen)
        return {"dit": params}

    def init(self, key: jax.Array, given: Any) -> Any:
        """The model's own initialisation, but for what is given."""
        return use_given({"dit": self.model.init(key, *self.model.dummy_inputs())["params"]}, given)

    def measure(self, full: Any) -> dict[str, float]:
        """Nothing."""
        return {}

    def grid(self, full: Any) -> tuple[Image.Image, dict[str, Any]]:
        """Samples of the labels in turn, a column each where there are 4 to 16."""
        settings, classes = self.config.sample, self.model.num_classes
        labels = [i % classes for i in range(settings.count)]
        samples = self.pipe(
            labels,
            steps=settings.steps,
            guidance_scale=settings.guidance,
            sampler=settings.sampler,
            seed=self.config.seed,
            params=full["dit"],
        )
        image = grid(self.pipe.pictures(samples), columns=classes if 4 <= classes <= 16 else None)
        return image, {"labels": labels, **settings.to_dict()}

    def samples(self, full: Any) -> Samples:
        """See `Task.samples`; the grid's settings."""
        s = self.config.sample
        settings = {"steps": s.steps, "guidance_scale": s.guidance, "sampler": s.sampler, "seed": self.config.seed}
        return of_pipeline(self.pipe, self.config.eval.num, self.config.batch_size, params=full["dit"], **settings)

    def facts(self, measures: Mapping[str, float]) -> dict[str, Any]:
        """See `Task.facts`."""
        return {
            "main": "dit",
            "models": {"dit": models.describe(self.model)},
            "class_names": list(self.source.class_names),
            "data_fingerprint": self.source.fingerprint,
        }

    def macs(self) -> int:
        """The model's."""
        return self.model.macs()
