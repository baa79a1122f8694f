"""The repair of settings for generation that a checkpoint could not be saved with."""

from __future__ import annotations

from loguru import logger
from transformers import PreTrainedModel

__all__ = ["make_generation_config_storable"]


def make_generation_config_storable(model: PreTrainedModel) -> None:
    """
    Mend a generation_config that transformers loads and refuses to save, before hours
    are spent on a model that could not be stored. Older checkpoints have settings for
    sampling, such as Vicuna's ``temperature``, without ``do_sample``.

    :param model: its generation_config is changed in place
    :raises ValueError: if it cannot be saved for another reason
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        if model.can_generate():
            raise ValueError(
                "the model has no generation_config, and transformers could not save "
                "it after the run: set model.generation_config = "
                "transformers.GenerationConfig()"
            )
        return
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = " ".join(str(error).split())
    before, config.do_sample = config.do_sample, True
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = before
        raise ValueError(
            f"the model could not be saved after the run: {reason}. Mend its "
            "generation_config.json, or set model.generation_config"
        ) from None
    logger.warning(
        "The model's generation_config has settings for sampling without do_sample, "
        f"and transformers would not save it. do_sample is true now ({reason})"
    )
