"""Recording against a reference: what the anchor's own parameters make of this pass's inputs, and nothing else."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from driftlens.adapters import MoELoraConfig, iter_sites
from driftlens.backbones import collate, load_backbone
from driftlens.cli.main import main
from driftlens.errors import FormatError, NotFoundError, SiteError
from driftlens.metrics import codrift_from_grams, drift_origin, expert_drift
from driftlens.recording import (
    HookPoint,
    Hooks,
    Site,
    SiteWeights,
    count_hooks,
    find_sites,
    record_checkpoint,
    write_probes,
)
from driftlens.recording.checkpoints import ADAPTER_WEIGHTS, load_checkpoint
from driftlens.recording.observer import Observer
from driftlens.recording.reference import Reference, load_reference, match_sites, reference_grams
from driftlens.store import Group, Recording, ReferenceGroup, SiteInfo, open_recording, verify_recording
from tests.adapters.loop import reference_gate

from .support import TARGETS, assert_same_rows, datasets, shake, toy_probes
from .test_observer import SYNCHRONISING, Spy

E, R = 3, 4
Truth = dict[str, dict[str, np.ndarray]]


def save_adapter(folder: Path, seed: int, *, gate: str = "softmax", experts: int = E, layers: tuple[int, ...] = (2, 3)):
    """Write a checkpoint whose experts and router all do something."""
    backbone = load_backbone("tiny-random")
    config = MoELoraConfig(
        num_experts=experts, r=R, gate=gate, target_modules=TARGETS, layers_to_transform=list(layers), init_std=0.3
    )
    model = get_peft_model(backbone.model, config)
    shake(model, seed)
    model.save_pretrained(folder)
    return folder


def recorded(ckpt: Path, out: Path, reference: Path | None, **options: object) -> Recording:
    record_checkpoint(ckpt, "tiny-random", toy_probes(), out, reference=reference, **options)  # type: ignore[arg-type]
    return open_recording(out)


def inner(group: Group) -> ReferenceGroup:
    found = group.reference
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor, the checkpoint after it, and the recording of the second against the first."""
    path = tmp_path_factory.mktemp("reference")
    save_adapter(path / "01-parity", 1)
    save_adapter(path / "02-digit", 2)
    recorded(path / "02-digit", path / "pair.h5", path / "01-parity").close()
    return path


@pytest.fixture
def pair(folder: Path) -> Iterator[Recording]:
    with open_recording(folder / "pair.h5") as recording:
        yield recording


def by_hand(current: Path, anchor: Path, task: str, gate: str = "softmax") -> Truth:
    """The anchor's equation on the inputs that really reach each layer of ``current``, in float64, token by token."""
    backbone = load_backbone("tiny-random")
    model = load_checkpoint(current, backbone=backbone).model
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
        for name, layer in iter_sites(model)
    ]
    with torch.inference_mode():
        for row in toy_probes().encode(backbone.encoder)[task]:
            batch = collate([row], pad_token_id=0)
            model.get_base_model()(**{k: v for k, v in batch.items() if k not in ("labels", "roles")})
    for handle in handles:
        handle.remove()
    now, then = (load_file(path / ADAPTER_WEIGHTS) for path in (current, anchor))
    scaling = next(layer.scaling["default"] for _, layer in iter_sites(model))
    truth: Truth = {}
    for name, parts in inputs.items():
        h = torch.cat(parts).double()

        def answers(
            stored: dict[str, Tensor], h: Tensor = h, name: str = name
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            a, b = (stored[f"base_model.model.{name}.moe_lora_{part}.weight"].double() for part in "AB")
            router = stored.get(f"base_model.model.{name}.moe_lora_gate.weight")
            pi = reference_gate(gate, h, a, None if router is None else router.double(), R, 1.0, 2)
            z = (h @ a.T).unflatten(-1, (-1, R))
            o = scaling * torch.stack([z[:, e] @ b[:, e * R : (e + 1) * R].T for e in range(z.shape[1])], dim=1)
            return pi.numpy(), z.numpy(), o.numpy()

        pi, z, o = answers(then)
        _, _, new = answers(now)
        truth[name] = {"gate": pi, "pathway": z, "output": o, "new_output": new}
    return truth


@pytest.mark.parametrize("gate", ["softmax", "topk", "energy"])
def test_rows_and_sums_are_the_anchors_equation_on_this_passs_inputs(gate: str, tmp_path: Path) -> None:
    anchor, current = (save_adapter(tmp_path / f"0{n}-x", n, gate=gate) for n in (1, 2))
    recording = recorded(current, tmp_path / "x.h5", anchor, tokens_per_sample=5)
    for p, task in enumerate(recording.probes):
        truth, tokens = by_hand(current, anchor, task, gate), recording.tokens(task)
        lengths = [len(row.input_ids) for row in toy_probes().encode(load_backbone("tiny-random").encoder)[task]]
        stored = np.concatenate([[0], np.cumsum(lengths)])[tokens["sample"]] + tokens["position"]
        for info in recording.sites:
            real, (group, s) = truth[info.name], recording.locate(info.name)
            seen, norms = inner(group), np.linalg.norm(real["output"], axis=-1)
            np.testing.assert_allclose(seen.read("gate", task)[s], real["gate"][stored], atol=1e-3)
            np.testing.assert_allclose(seen.read("pathway", task)[s], real["pathway"][stored], rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(seen.read("expert_norm", task)[s], norms[stored], rtol=2e-3)
            expected = {
                "gate_sum": real["gate"].sum(0),
                "gate_outer": np.einsum("ne,nf->ef", real["gate"], real["gate"]),
                "gated_energy": np.einsum("ne,nek->ek", real["gate"], real["pathway"] ** 2),
                "second_moment": np.einsum("nek,nel->ekl", real["pathway"], real["pathway"]),
                "entropy": -np.where(real["gate"] > 0, real["gate"] * np.log(real["gate"] + 1e-300), 0).sum(),
                "energy": (real["pathway"] ** 2).sum((0, 2)),
                "expert_sq": (norms**2).sum(0),
                "drift_sq": ((real["new_output"] - real["output"]) ** 2).sum((0, 2)),
            }
            for name, value in expected.items():
                found, scale = seen.stats[name][s, p], np.abs(value).max()
                np.testing.assert_allclose(found / scale, value / scale, rtol=0, atol=1e-5, err_msg=name)
            assert seen.stats["count"][p] == len(real["gate"]) > len(tokens["sample"])


def test_expert_drift_is_exact_over_all_tokens(folder: Path, pair: Recording) -> None:
    for p, task in enumerate(pair.probes):
        truth = by_hand(folder / "02-digit", folder / "01-parity", task)
        for info in pair.sites:
            group, s = pair.locate(info.name)
            sums, real = inner(group).stats, truth[info.name]
            change = np.linalg.norm(real["new_output"] - real["output"], axis=(0, 2))
            found = expert_drift(sums["drift_sq"][s, p], sums["expert_sq"][s, p]).value
            np.testing.assert_allclose(found, change / np.linalg.norm(real["output"], axis=(0, 2)), rtol=1e-5)


def test_a_checkpoint_against_itself_has_drifted_nowhere(folder: Path, tmp_path: Path) -> None:
    recording = recorded(folder / "02-digit", tmp_path / "self.h5", folder / "02-digit")
    (group,) = recording.groups
    seen = inner(group)
    drift = expert_drift(seen.stats["drift_sq"], seen.stats["expert_sq"]).value
    assert drift.max() < 1e-6
    for name in ("gate", "pathway", "expert_norm"):
        assert_same_rows(getattr(seen, name)[...], getattr(group, name)[...], name)
    for name in ("gate_sum", "second_moment", "entropy", "expert_sq"):
        np.testing.assert_allclose(seen.stats[name], group.stats[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_gauge_of_the_anchor_changes_pathways_but_no_drift(folder: Path, pair: Recording, tmp_path: Path) -> None:
    turned = save_adapter(tmp_path / "01-parity", 1)
    weights, g = load_file(turned / ADAPTER_WEIGHTS), torch.Generator().manual_seed(4)
    for name in [name for name in weights if name.endswith("moe_lora_A.weight")]:
        other = name.replace("moe_lora_A", "moe_lora_B")
        for e in range(E):
            part = slice(e * R, (e + 1) * R)
            gauge = torch.eye(R) + 0.4 * torch.randn(R, R, generator=g)
            weights[name][part] = gauge @ weights[name][part]
            weights[other][:, part] = weights[other][:, part] @ torch.linalg.inv(gauge)
    save_file(weights, turned / ADAPTER_WEIGHTS, {"format": "pt"})
    recording = recorded(folder / "02-digit", tmp_path / "turned.h5", turned)
    seen, before = inner(recording.groups[0]), inner(pair.groups[0])
    np.testing.assert_allclose(seen.stats["drift_sq"], before.stats["drift_sq"], rtol=1e-4)
    np.testing.assert_allclose(seen.stats["expert_sq"], before.stats["expert_sq"], rtol=1e-4)
    assert np.abs(seen.pathway[...] - before.pathway[...]).max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_padding_change_nothing(batch_size: int, folder: Path, pair: Recording, tmp_path: Path) -> None:
    recording = recorded(folder / "02-digit", tmp_path / "x.h5", folder / "01-parity", batch_size=batch_size)
    seen, before = inner(recording.groups[0]), inner(pair.groups[0])
    for name in ("gate", "pathway", "expert_norm"):
        assert_same_rows(getattr(seen, name)[...], getattr(before, name)[...], name)
    for name in ("gate_sum", "second_moment", "entropy", "expert_sq", "drift_sq"):
        np.testing.assert_allclose(seen.stats[name], before.stats[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_everything_else_is_as_without_a_reference(folder: Path, tmp_path: Path) -> None:
    with recorded(folder / "02-digit", tmp_path / "x.h5", None) as alone:
        assert not alone.has_reference
        assert alone.reference(alone.groups[0]) is None
    without, with_it = datasets(tmp_path / "x.h5"), datasets(folder / "pair.h5")
    assert {name for name in with_it.keys() - without.keys() if "/reference/" not in name} == set()
    for name, array in without.items():
        np.testing.assert_array_equal(array, with_it[name], err_msg=name)


def test_outputs_stay_bit_equal_and_no_input_is_kept(folder: Path) -> None:
    backbone = load_backbone("tiny-random")
    loaded = load_checkpoint(folder / "02-digit", backbone=backbone)
    rows = toy_probes().encode(backbone.encoder)["parity"]
    batch = {k: v for k, v in collate(rows, pad_token_id=0).items() if k not in ("labels", "roles")}
    root = loaded.model.get_base_model()
    with torch.inference_mode():
        bare = root(**batch).logits
        reference = load_reference(loaded, folder / "01-parity")
        observer = Observer(find_sites(loaded.model), reference)
        observer.expect(batch["attention_mask"].flatten().nonzero().squeeze(1), torch.arange(5))
        widths: set[int] = set()

        def on_fire(index: int, args: tuple, output: object) -> None:
            observer.on_fire(index, args, output)
            widths.update(value.shape[-1] for seen in observer._seen for value in seen.values() if value.dim() > 1)

        with Spy() as spy, Hooks(root, observer.points, on_fire, observer.on_pass):
            watched = root(**batch).logits
    assert torch.equal(watched, bare)
    assert widths == {E, R}, "only gates and pathways are kept from a site"
    assert [name for name in spy.calls if name.startswith(SYNCHRONISING)] == [], "no hook makes the host wait"
    assert count_hooks(root) == 0
    assert loaded.model.active_adapter == "default"
    (group,) = observer.take()
    assert group.values["reference/gate"].shape == (6, 5, E)


def test_no_hidden_state_reaches_the_file(folder: Path, pair: Recording) -> None:
    widths = {info.d_in for info in pair.sites} | {info.d_out for info in pair.sites}
    stored = {name: array.shape for name, array in datasets(folder / "pair.h5").items() if "weights/" not in name}
    assert any("/reference/" in name for name in stored)
    assert not widths & {pair.n_tokens, len(pair.sites)}, "the sizes can be told apart"
    assert [name for name, shape in stored.items() if widths & set(shape)] == []
    assert verify_recording(pair.path) == []


def test_the_file_says_which_checkpoint_the_reference_is(folder: Path, pair: Recording) -> None:
    anchor = load_checkpoint(folder / "01-parity", "tiny-random")
    assert (pair.meta["reference"], pair.meta["reference_sha256"]) == ("01-parity", anchor.sha256)
    assert isinstance(pair.reference(0), ReferenceGroup)


def test_sites_and_experts_that_the_anchor_lacks_have_gate_and_output_0(folder: Path, tmp_path: Path) -> None:
    small = save_adapter(tmp_path / "00-small", 3, experts=2, layers=(3,))
    recording = recorded(folder / "02-digit", tmp_path / "x.h5", small)
    truth = by_hand(folder / "02-digit", folder / "02-digit", "parity")
    for info in recording.sites:
        group, s = recording.locate(info.name)
        seen = inner(group)
        gate, norm = seen.read("gate", "parity")[s], seen.read("expert_norm", "parity")[s]
        here = info.layer == 3
        np.testing.assert_allclose(gate.sum(-1), float(here), atol=1e-3)
        assert (norm[:, : 2 * here] > 0).all()
        assert not gate[:, 2 * here :].any()
        assert not norm[:, 2 * here :].any()
        # what was not there has moved by all that it is now
        new = (truth[info.name]["new_output"] ** 2).sum((0, 2))
        p = recording.probes.index("parity")
        absent = slice(2 * here, E)
        np.testing.assert_allclose(seen.stats["drift_sq"][s, p, absent], new[absent], rtol=1e-4)
        assert np.isnan(expert_drift(seen.stats["drift_sq"], seen.stats["expert_sq"]).value[s, p, absent]).all()


def test_inherited_and_local_add_up_to_the_drift_between_two_files(
    folder: Path, pair: Recording, tmp_path: Path
) -> None:
    old = recorded(folder / "01-parity", tmp_path / "anchor.h5", None)
    for task in pair.probes:
        anchor, group = old.groups[0], pair.groups[0]
        seen, sample = inner(group), pair.tokens(task)["sample"]
        assert seen.grams is not None
        grams = [seen.grams[name][...] for name in ("anchor", "cross", "current")]
        sides = [(part.read("gate", task), part.read("pathway", task)) for part in (anchor, seen, group)]
        found = drift_origin(*sides, *grams).reduce(sample)
        (gate0, z0), _, (gate1, z1) = sides
        phi = codrift_from_grams(gate0, gate1, z0, z1, *grams).reduce(sample)
        np.testing.assert_allclose(found.inherited + found.local + 2 * found.cross, phi.total, rtol=0, atol=1e-12)
        first = [info.layer == 2 and info.kind != "down_proj" for info in pair.sites]
        # nothing below the first adapted layer changed: it inherits nothing but float16 rounding
        assert found.inherited[first].max() < 1e-5 < found.inherited[~np.array(first)].min()


def test_grams_are_those_of_the_stored_weights(folder: Path, pair: Recording, tmp_path: Path) -> None:
    old = recorded(folder / "01-parity", tmp_path / "anchor.h5", None)
    grams = inner(pair.groups[0]).grams
    assert grams is not None
    for s, info in enumerate(pair.sites):
        b0, b1 = (
            np.swapaxes(np.asarray(r.weights(info.name)["B"], np.float64), 0, 1).reshape(info.d_out, E * R)
            * info.scaling
            for r in (old, pair)
        )
        for name, expected in (("anchor", b0.T @ b0), ("cross", b0.T @ b1), ("current", b1.T @ b1)):
            np.testing.assert_allclose(grams[name][s], expected, rtol=1e-6, atol=1e-8)


def test_plain_peft_lora_has_a_reference_too(tmp_path: Path) -> None:
    for number in (1, 2):
        model = get_peft_model(load_backbone("tiny-random").model, LoraConfig(r=4, target_modules=["down_proj"]))
        g = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2, generator=g)
        model.save_pretrained(tmp_path / f"0{number}")
    recording = recorded(tmp_path / "02", tmp_path / "x.h5", tmp_path / "01")
    then = recorded(tmp_path / "01", tmp_path / "y.h5", None)
    lowest = min(recording.sites, key=lambda info: info.layer)
    group, s = recording.locate(lowest.name)
    # nothing below the first adapted layer differs, so the anchor's own pass gives the same answers there
    mine, own = (part.read("pathway", "parity")[s] for part in (inner(group), then.groups[0]))
    np.testing.assert_allclose(mine, own, rtol=2e-3, atol=1e-3)
    assert np.abs(mine - group.read("pathway", "parity")[s]).max() > 0.01
    assert (inner(group).gate[...] == 1).all()


def test_the_command_line_takes_a_reference_for_one_checkpoint_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_probes(toy_probes(2), tmp_path / "probes")
    anchor, out = folder / "01-parity", tmp_path / "x.h5"
    call = ["driftlens", "record", "--reference", str(anchor), "--quiet", "--json"]
    one = ["--ckpt", str(folder / "02-digit"), "--base", "tiny-random", "--probes", str(tmp_path / "probes")]
    monkeypatch.setattr(sys, "argv", [*call, *one, "--out", str(out)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code, capsys.readouterr().err
    with open_recording(out) as recording:
        assert recording.meta["reference"] == "01-parity"
    monkeypatch.setattr(sys, "argv", [*call, "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code
    assert "--reference belongs to --ckpt" in " ".join(capsys.readouterr().err.split())


# --- sites of other kinds, by hand -----------------------------------------------------------------------------------


class Layer(nn.Module):
    """A mixture of LoRA experts with a router, written out; ``product`` multiplies sums as some methods do."""

    def __init__(self, seed: int, rank: int = 2, *, product: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.base, self.rank, self.product = nn.Linear(5, 7), rank, product
        self.a, self.b = torch.randn(E, rank, 5, generator=g), torch.randn(E, 7, rank, generator=g)
        self.router = torch.randn(E, 5, generator=g)

    def respond(self, h: Tensor) -> dict[str, Tensor]:
        answer = {"gate": torch.softmax(h @ self.router.T, -1), "pathway": torch.einsum("nd,erd->ner", h, self.a)}
        return answer if self.rank else {"gate": answer["gate"]}

    def expert_outputs(self, h: Tensor) -> Tensor:
        answer = self.respond(h)
        middle = answer["pathway"]
        if self.product:
            middle = torch.einsum("ne,ner->nr", answer["gate"], middle).unsqueeze(1).expand_as(middle)
        return 2.0 * torch.einsum("ner,eor->neo", middle, self.b)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.base(h)
        if not self.rank:
            return y
        return y + torch.einsum("ne,neo->no", self.respond(h)["gate"], self.expert_outputs(h))


def site_of(name: str, layer: Layer, **changes: object) -> Site:
    info = SiteInfo(
        name=name, layer=0, kind=name, num_experts=E, rank=layer.rank, d_in=5, d_out=7, scaling=2.0, gate="softmax",
        semantics="product_of_sums" if layer.product else "sum_gBA",
    )  # fmt: skip

    def read(_part: str, args: tuple, output: Tensor) -> dict[str, Tensor]:
        return {"input": args[0], "base_norm": output.norm(dim=-1), **layer.respond(args[0])}

    def weights() -> SiteWeights:
        return SiteWeights(layer.a, layer.b, layer.router) if layer.rank else SiteWeights(None, None, layer.router)

    site = Site(info, layer, (HookPoint(name, "base", layer.base),), read, weights, layer.respond)
    return dataclasses.replace(site, **changes)  # type: ignore[arg-type]


def observe(old: list[Layer], new: list[Layer], h: Tensor) -> tuple[Observer, list]:
    names = [f"layer{index}" for index in range(len(new))]
    reference = Reference("anchor", "0" * 64, [site_of(name, layer) for name, layer in zip(names, old, strict=True)])
    observer = Observer([site_of(name, layer) for name, layer in zip(names, new, strict=True)], reference)
    root = nn.Sequential(*[nn.Identity()])
    root.forward = lambda x: [layer(x) for layer in new]  # type: ignore[method-assign]
    observer.expect(torch.arange(len(h)), torch.arange(3))
    with torch.inference_mode(), Hooks(root, observer.points, observer.on_fire, observer.on_pass):
        root(h)
    return observer, observer.take()


def test_sums_that_multiply_and_gates_without_pathways_have_a_reference() -> None:
    h = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    old = [Layer(1, product=True), Layer(2), Layer(3, rank=0)]
    new = [Layer(4, product=True), Layer(5), Layer(6, rank=0)]
    _, (ranked, native) = observe(old, new, h)
    for s in range(2):
        then, now = old[s].expert_outputs(h), new[s].expert_outputs(h)
        np.testing.assert_allclose(ranked.sums["reference/drift_sq"][s], (now - then).square().sum((0, 2)), rtol=1e-4)
        np.testing.assert_allclose(ranked.sums["reference/expert_sq"][s], then.square().sum((0, 2)), rtol=1e-4)
        np.testing.assert_allclose(ranked.values["reference/expert_norm"][s], then[:3].norm(dim=-1), rtol=1e-4)
    gate = old[2].respond(h)["gate"]
    np.testing.assert_allclose(native.values["reference/gate"][0], gate[:3], rtol=1e-5)
    np.testing.assert_allclose(native.sums["reference/gate_sum"][0], gate.sum(0), rtol=1e-5)
    assert "reference/drift_sq" not in native.sums


def test_small_drifts_do_not_drown_in_rounding() -> None:
    h = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    old, new = Layer(1), Layer(1)
    new.b = old.b * (1 + 1e-5)
    _, (group,) = observe([old], [new], h)
    found = expert_drift(group.sums["reference/drift_sq"], group.sums["reference/expert_sq"]).value
    np.testing.assert_allclose(found, 1e-5, rtol=0.02)


def test_a_site_whose_gate_does_not_follow_from_its_input_is_named() -> None:
    sites = [site_of("layer0", Layer(1)), site_of("layer1", Layer(2))]
    fixed = Reference("anchor", "0" * 64, [sites[0], dataclasses.replace(sites[1], respond=None)])
    with pytest.raises(
        SiteError, match=r"Site layer1 .* does not follow from the site's input alone.*without --reference"
    ):
        Observer(sites, fixed)
    with pytest.raises(SiteError, match=r"Site layer1 "):
        Observer(fixed.sites, Reference("anchor", "0" * 64, sites))


def test_an_anchor_of_another_model_is_refused() -> None:
    site = site_of("layer0", Layer(1))
    with pytest.raises(
        SiteError, match=r"'anchor' has none of the recorded sites \(it has elsewhere; recorded are layer0"
    ):
        match_sites([site], Reference("anchor", "0" * 64, [site_of("elsewhere", Layer(1))]))
    with pytest.raises(SiteError, match=r"Site layer0 has E=3, r=2, .* but E=3, r=4, .* in the reference 'anchor'"):
        reference_grams([site], Reference("anchor", "0" * 64, [site_of("layer0", Layer(1, rank=4))]))


def test_reference_gates_that_do_not_sum_to_1_are_refused() -> None:
    h, broken = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), Layer(1)
    broken.respond = lambda h: {k: 2 * v for k, v in Layer.respond(broken, h).items()}  # type: ignore[method-assign]
    with pytest.raises(SiteError, match="site layer0, with the reference's parameters, do not sum to 1"):
        observe([broken], [Layer(2)], h)


def test_a_reference_that_cannot_be_loaded_is_named_and_leaves_the_model_alone(folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder / "02-digit", "tiny-random")
    with pytest.raises(NotFoundError, match="No checkpoint at"):
        load_reference(loaded, tmp_path / "nowhere")
    model = get_peft_model(load_backbone("tiny-random").model, LoraConfig(r=4, target_modules=["down_proj"]))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises((FormatError, SiteError), match="lora"):
        load_reference(loaded, tmp_path / "lora")
    mixed = save_adapter(tmp_path / "mixed", 5)
    weights = load_file(mixed / ADAPTER_WEIGHTS)
    del weights[min(weights)]
    save_file(weights, mixed / ADAPTER_WEIGHTS, {"format": "pt"})
    with pytest.raises(FormatError, match=r"mixed.*1 missing"):
        load_reference(loaded, mixed)
    assert loaded.model.active_adapter == "default"
    assert list(loaded.model.peft_config) == ["default"]
    assert load_reference(loaded, folder / "01-parity").name == "01-parity"
