"""Loads the weights that a model is built with: whole models, warm starts, and adapters with their backbones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, list_pretrained, resolve_pretrained_cfg
from torch import nn

from timm_mrla.models._adapter import complete, fingerprint
from timm_mrla.models._weights import is_warm_start, start_untrained, warn_untrained
from timm_mrla.state_dict import StateDict, fit_state_dict, listed


def _resolve(*args: Any) -> PretrainedCfg:
    """Resolve a configuration as timm does, and name the file in a repository.

    Otherwise timm takes a failure of the network for a missing file, and asks for a pickle.
    """
    cfg = resolve_pretrained_cfg(*args)
    if cfg.hf_hub_id and not cfg.hf_hub_filename and (cfg.source or cfg.hf_hub_id.startswith('timm/')):
        return replace(cfg, hf_hub_filename='model.safetensors', custom_load=False)
    return cfg


class Loading:
    """Where the weights of one model come from, and how they are completed.

    A saved adapter has layer attention and the classifier alone. Its configuration has the tag of the backbone's
    weights, and their fingerprint. An overlay that names weights, such as `file`, names the backbone's then.
    """

    fingerprint = ''  # of an adapter's backbone, if its weights were read

    def __init__(
        self,
        entry: str,
        pretrained: bool,
        pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None,
        overlay: dict[str, Any] | None,
        model_args: dict[str, Any],
        is_adapter: bool,
    ) -> None:
        """
        Args:
            entry: The model's name.
            pretrained: Whether weights are loaded.
            pretrained_cfg: Its configuration, or a tag.
            overlay: Values that replace those of the configuration.
            model_args: The model's arguments, with those of saved weights under `pretrained_model_args`.
            is_adapter: Whether the model is built as an adapter.

        Raises:
            RuntimeError: There are no weights.
        """
        saved = model_args.get('pretrained_model_args', {}).get('mrla_adapter')
        self.saved, self.is_adapter = saved if isinstance(saved, str) else '', is_adapter
        backbones_overlay = None
        if self.saved and {*(overlay or {})} & {'file', 'url', 'hf_hub_id'}:
            overlay, backbones_overlay = None, overlay
        self.cfg = _resolve(entry, pretrained_cfg, overlay)
        if pretrained and not (self.cfg.has_weights or self.cfg.state_dict):
            starts = list_pretrained(f'{entry}.*')
            known = f'its warm starts are {listed(starts)}' if starts else 'it has no warm start either'
            raise RuntimeError(f'No pretrained weights exist for {entry}; {known}. Or use pretrained=False')
        self.starts_warm = is_warm_start(self.cfg) and not self.cfg.source
        self.backbone = self.cfg if self.starts_warm and pretrained else None
        if pretrained and (self.saved or (self.starts_warm and self.cfg.state_dict)):
            # an overlay with a state dict describes that state dict
            self.backbone = _resolve(entry, self.cfg.tag, backbones_overlay)

    def fit(
        self,
        state_dict: StateDict,
        model: nn.Module,
        convert: Callable[[StateDict, nn.Module], StateDict],
        strict: bool,
    ) -> StateDict:
        """Convert and complete a checkpoint, so that it fits the model.

        Args:
            state_dict: The checkpoint.
            model: The model.
            convert: Converts names of timm's weights and of the paper's code.
            strict: Whether all names of the backbone must be there.

        Raises:
            RuntimeError: It does not fit.
        """
        if self.saved:
            self.fingerprint = self.saved
            return fit_state_dict(
                complete(state_dict, model, self.backbone, self.saved, convert, strict), model, self.cfg
            )
        converted = convert(state_dict, model)
        if not self.starts_warm or any('.mrla.' in name for name in converted):
            return fit_state_dict(converted, model, self.cfg, strict)
        converted = start_untrained(converted, model, self.cfg, strict)
        if self.is_adapter:
            self.fingerprint = fingerprint(state_dict, self.cfg)
        else:
            warn_untrained(self.cfg)
        return converted
