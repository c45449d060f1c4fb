"""Recording against a reference: the anchor's parameters on the inputs of this pass, in the same pass.

Drift between two passes mixes two causes: other parameters, and other inputs because the layers below changed. With
the anchor's answers on *these* inputs the two can be told apart. An input is used inside the hook and then dropped:
hidden states never reach the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from driftlens.errors import ConfigError, FormatError, SiteError
from driftlens.recording.checkpoints import (
    LoadedCheckpoint,
    check_keys,
    checkpoint_sha256,
    is_whole_model,
    read_config,
)
from driftlens.recording.families.foreign import foreign_site
from driftlens.recording.sites import Site, find_sites
from driftlens.store import SiteInfo, group_sites

__all__ = ["REFERENCE_ADAPTER", "Reference", "drift_roots", "load_reference", "match_sites", "reference_grams"]

REFERENCE_ADAPTER = "reference"
"""Name under which the anchor is loaded beside the recorded adapter; it is never active in a forward."""

_MUST_AGREE = ("d_in", "d_out", "semantics")


@dataclass(frozen=True)
class Reference:
    """The anchor of a recording: its sites, which answer to the inputs of the recorded pass.

    Any loader can give one; the sites need not belong to the recorded model, but must lie on its device.

    Attributes:
        name: name of the anchor checkpoint.
        sha256: its hash.
        sites: its sites, each with ``respond``. They are matched by name: a site or an expert that the anchor lacks has
            gate 0 and output 0 there.
    """

    name: str
    sha256: str
    sites: Sequence[Site]

    @property
    def meta(self) -> dict[str, Any]:
        """What a recording says about its reference."""
        return {"reference": self.name, "reference_sha256": self.sha256}


def load_reference(loaded: LoadedCheckpoint, folder: Path | str) -> Reference:
    """Load the anchor ``folder`` beside an adapter, without changing what the model computes.

    Args:
        loaded: the checkpoint to be recorded.
        folder: folder of the anchor, of the same kind as the checkpoint's: PEFT adapter or foreign.

    Raises:
        ConfigError: one of the two is a whole model.
        NotFoundError: no such folder, or no adapter in it.
        FormatError: the adapter cannot be read or does not fit the model.
        SiteError: the anchor has no observable site.
    """
    folder = Path(folder)
    if is_whole_model(loaded.folder) or is_whole_model(folder):
        raise ConfigError(
            f"A reference is an adapter on the base model of the checkpoint; {folder} or {loaded.folder} is a whole "
            "model. Record both with --ckpt and put them side by side with `driftlens collect`."
        )
    digest = checkpoint_sha256(folder)
    if loaded.foreign is not None:
        layers = loaded.foreign.anchor_layers(loaded.model, folder)
        return Reference(folder.name, digest, [foreign_site(name, layer) for name, layer in layers.items()])
    read_config(folder)
    model, active = loaded.peft, loaded.peft.active_adapter
    device = next(model.parameters()).device
    _unload(model)
    sites: list[Site] = []
    try:
        model.load_adapter(str(folder), REFERENCE_ADAPTER, torch_device=str(device))
        check_keys(folder, model, REFERENCE_ADAPTER)
        model.set_adapter(REFERENCE_ADAPTER)
        sites = find_sites(model)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[-1].strip()
        raise FormatError(
            f"The reference {folder} cannot be loaded beside {loaded.folder} ({type(error).__name__}: {first:.300}). "
            "An anchor is an earlier checkpoint of the same kind on the same base model: give that one."
        ) from error
    finally:
        model.set_adapter(active)
        if not sites:
            _unload(model)
    model.to(device).eval()
    return Reference(folder.name, digest, sites)


def _unload(model: PeftModel) -> None:
    if REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)


def match_sites(sites: Sequence[Site], reference: Reference) -> list[Site | None]:
    """Return for every site the anchor's site of the same name; None where the anchor has none.

    Raises:
        SiteError: no site has a match, a site cannot answer to given inputs, or its shape does not fit.
    """
    by_name = {site.info.name: site for site in reference.sites}
    matched = [by_name.get(site.info.name) for site in sites]
    if not any(matched):
        raise SiteError(
            f"The reference {reference.name!r} has none of the recorded sites (it has "
            f"{', '.join(list(by_name)[:3]) or 'no sites'}; recorded are {sites[0].info.name}, ...). "
            "Give an earlier checkpoint of the same model."
        )
    for site, anchor in zip(sites, matched, strict=True):
        if anchor is not None:
            _check(site, anchor, reference.name)
    return matched


def _check(site: Site, anchor: Site, name: str) -> None:
    now, then = site.info, anchor.info
    if site.respond is None or anchor.respond is None:
        raise SiteError(
            f"Site {now.name} (family {now.family}, gate {now.gate}) cannot be recorded with a reference: its gate "
            "does not follow from the site's input alone. Record without --reference."
        )
    differing = [field for field in _MUST_AGREE if getattr(now, field) != getattr(then, field)]
    if differing or then.num_experts > now.num_experts or then.rank > now.rank or (then.rank > 0) != (now.rank > 0):

        def words(info: SiteInfo) -> str:
            return f"E={info.num_experts}, r={info.rank}, d_in={info.d_in}, d_out={info.d_out}, {info.semantics}"

        raise SiteError(
            f"Site {now.name} has {words(now)}, but {words(then)} in the reference {name!r}. An anchor may have fewer "
            "experts or ranks, never more, and must agree in the rest: give an earlier checkpoint of the same model."
        )


def padded_outputs(site: Site | None, like: SiteInfo) -> Float[Tensor, "E d_out r"] | None:
    """Return s B of a site in float32, padded with zeros to the E and r of ``like``; None without a site."""
    if site is None:
        return None
    b = site.weights().b
    if b is None:
        raise SiteError(f"Site {like.name} of family {like.family} has a rank but gives no B.")
    extra = (0, like.rank - site.info.rank, 0, 0, 0, like.num_experts - site.info.num_experts)
    return nn.functional.pad(b.detach().float(), extra) * site.info.scaling


def drift_roots(
    sites: Sequence[Site], anchors: Sequence[Site | None]
) -> tuple[Float[Tensor, "S E r r"], Float[Tensor, "S E two_r two_r"]]:
    """Return the roots that give norms of expert outputs of the anchor, and of their change, from short vectors.

    Args:
        sites: sites of equal E and r above 0.
        anchors: the anchor's sites, matched.

    Returns:
        R0_e with ||R0_e m0|| = ||o0_e||, and D_e with ||D_e [m1 - m0; m0]|| = ||o1_e - o0_e||, where m0 and m1 are
        what enters B at the anchor and now. Written in differences, equal parameters give 0 without cancellation.
    """
    roots, changes = [], []
    for site, anchor in zip(sites, anchors, strict=True):
        new = padded_outputs(site, site.info)
        assert new is not None  # a site of the recording is there
        old = padded_outputs(anchor, site.info)
        old = torch.zeros_like(new) if old is None else old.to(new.device)
        roots.append(_root(old))
        changes.append(_root(torch.cat([new, new - old], dim=-1)))
    return torch.stack(roots), torch.stack(changes)


def _root(columns: Float[Tensor, "E d_out c"]) -> Float[Tensor, "E c c"]:
    factor = torch.linalg.qr(columns, mode="r").R
    # d_out < c gives a flat factor; rows of zeros make it square and change no norm
    return nn.functional.pad(factor, (0, 0, 0, columns.shape[-1] - factor.shape[-2]))


def reference_grams(sites: Sequence[Site], reference: Reference) -> list[dict[str, NDArray[np.float64]]]:
    """Return per group of sites the Gram matrices that split its drift (scalings included, expert-slowest).

    Returns:
        Per group ``anchor`` = B0^T B0, ``cross`` = B0^T B1 and ``current`` = B1^T B1, each [S, E*r, E*r] float64;
        empty where the rank is 0.
    """
    anchors = match_sites(sites, reference)
    result = []
    for members in group_sites([site.info for site in sites]):
        rows = [_site_grams(sites[i], anchors[i]) for i in members if sites[i].info.rank]
        result.append({name: np.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())})
    return result


def _site_grams(site: Site, anchor: Site | None) -> Mapping[str, NDArray[np.float64]]:
    flat = site.info.num_experts * site.info.rank
    new, old = (_flat(padded_outputs(part, site.info)) for part in (site, anchor))
    assert new is not None  # a site of the recording is there
    if old is None:
        zero = np.zeros((flat, flat))
        return {"anchor": zero, "cross": zero, "current": new.T @ new}
    return {"anchor": old.T @ old, "cross": old.T @ new, "current": new.T @ new}


def _flat(outputs: Tensor | None) -> NDArray[np.float64] | None:
    if outputs is None:
        return None
    moved: NDArray[np.float64] = outputs.permute(1, 0, 2).flatten(1).double().cpu().numpy()
    return moved
