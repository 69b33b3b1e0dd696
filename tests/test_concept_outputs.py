"""ConceptAttention, ``concepts(method="outputs")``, beside stock blocks that get the concepts in place of the text."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from transformers import AutoTokenizer

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["cat", "red tree", "snowboard"]


def concept_attention(network, run, concepts: list[torch.Tensor], measured: set[int], h: int, w: int) -> torch.Tensor:
    """ConceptAttention's steps: every block sees the image as it is in the network, and the concepts in place of the
    text; products of what attention gives both, before it is projected; the mean over blocks and the tokens of a word.
    """
    blocks, given, images, hooks = network.transformer_blocks, {}, {}, []
    for i in range(max(measured) + 1):
        keep = lambda _, __, kwargs, i=i: given.__setitem__(i, kwargs)  # noqa: E731
        hooks.append(blocks[i].register_forward_pre_hook(keep, with_kwargs=True))
        hooks.append(blocks[i].attn.to_out[0].register_forward_pre_hook(lambda _, x, i=i: images.setdefault(i, x[0])))
    with torch.no_grad():
        run()
        for hook in hooks:
            hook.remove()
        stream, products = network.context_embedder(torch.cat(concepts, 1)), []
        for i, seen in sorted(given.items()):
            mine: list[torch.Tensor] = []
            hook = blocks[i].attn.to_add_out.register_forward_pre_hook(lambda _, x, mine=mine: mine.append(x[0]))
            if "image_rotary_emb" in seen:  # all text is at one position
                text = seen["encoder_hidden_states"].shape[1] - stream.shape[1]
                seen = seen | {"image_rotary_emb": tuple(x[text:] for x in seen["image_rotary_emb"])}
            stream, _ = blocks[i](**seen | {"encoder_hidden_states": stream.expand(len(seen["temb"]), -1, -1)})
            hook.remove()
            if i in measured:
                products.append(torch.einsum("bnc,bkc->bkn", images[i], mine[0]))
    words = torch.split(torch.stack(products).mean(0), [some.shape[1] for some in concepts], 1)
    return torch.stack([tokens.mean(1).unflatten(1, (h, w)) for tokens in words], 1)


def test_flux_is_read_as_conceptattention_reads_it(tiny_folder):
    """At its own blocks, 15 to 18, whatever the prompt is, and at others."""
    folder, prompt = tiny_folder("flux_schnell"), "a photo of a {} here"
    backbone = db.create_model(
        "flux_schnell", recipe=["vit-block18-out"], checkpoint_path=folder, noise="none", timestep=500
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    network, (h, w) = tiny.build("flux_schnell")["transformer"], (4, 6)
    torch.manual_seed(1)
    z = torch.randn(2, 16, 2 * h, 2 * w)
    given = backbone.prompter([prompt.format(" ".join(WORDS))])
    run = lambda: network(  # noqa: E731
        diffusers.FluxPipeline._pack_latents(z, 2, 16, 2 * h, 2 * w),
        encoder_hidden_states=given["prompt_embeds"].expand(2, -1, -1),
        pooled_projections=given["pooled_prompt_embeds"].expand(2, -1),
        timestep=torch.tensor([0.5, 0.5]),
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32),
        txt_ids=torch.zeros(256, 3),
        return_dict=False,
    )
    lengths = {word: len(tokenizer(word).input_ids) - 1 for word in WORDS}
    assert max(lengths.values()) > 1
    concepts = [backbone.prompter([word])["prompt_embeds"][:, : lengths[word]] for word in WORDS]
    right = concept_attention(network, run, concepts, {15, 16, 17, 18}, h, w)
    ours = {"prompt": prompt, "method": "outputs", "latents": z}
    raw = backbone.concepts(None, WORDS, raw=True, **ours)
    torch.testing.assert_close(raw, right, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(raw[:, 0], raw[:, 1], rtol=1e-2, atol=1e-2)
    low, high = right.amin((2, 3), keepdim=True), right.amax((2, 3), keepdim=True)
    torch.testing.assert_close(
        backbone.concepts(None, WORDS, **ours), (right - low) / (high - low), rtol=1e-3, atol=1e-3
    )
    two = backbone.concepts(None, WORDS, raw=True, layers=["vit-block0-attn-out", "vit-block3-attn-out"], **ours)
    torch.testing.assert_close(two, concept_attention(network, run, concepts, {0, 3}, h, w), rtol=1e-4, atol=1e-4)


def test_sd3_is_read_at_the_layers_that_are_named(tiny_folder):
    """Without positions, and with the image before the text."""
    folder = tiny_folder("sd3_medium")
    backbone = db.create_model(
        "sd3_medium", recipe=["vit-block9-out"], checkpoint_path=folder, noise="none", timestep=515
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    network, (h, w) = tiny.build("sd3_medium")["transformer"], (8, 12)
    torch.manual_seed(1)
    z = torch.randn(1, 16, 2 * h, 2 * w)
    given = backbone.prompter(["a photo"])
    run = lambda: network(  # noqa: E731
        z, given["prompt_embeds"], given["pooled_prompt_embeds"], torch.tensor([515.0]), return_dict=False
    )
    lengths = [len(tokenizer(word).input_ids) - 2 for word in WORDS]
    embedded = [backbone.prompter([word])["prompt_embeds"] for word in WORDS]
    concepts = [text[:, 1 : 1 + length] for text, length in zip(embedded, lengths, strict=True)]
    ours = {"prompt": "a photo", "method": "outputs", "latents": z, "raw": True}
    raw = backbone.concepts(None, WORDS, layers=["vit-block9-attn-out", "vit-block2-attn-out"], **ours)
    torch.testing.assert_close(raw, concept_attention(network, run, concepts, {2, 9}, h, w), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no source says at which layers sd3_medium.* name some in layers="):
        backbone.concepts(None, WORDS, **ours)
    with pytest.raises(ValueError, match="'vit-block23-attn-out' is no output .* vit-block0-attn-out to vit-block22-"):
        backbone.concepts(None, WORDS, layers="vit-block23-attn-out", **ours)
    with pytest.raises(ValueError, match="is cut behind the last activation"):
        backbone.concepts(None, WORDS, layers="vit-block12-attn-out", **ours)


@pytest.mark.parametrize("name", ["sd15", "pixart_sigma_1024", "qwen_image", "flux2_dev"])
def test_networks_whose_blocks_cannot_are_refused_by_name(name):
    recipe = ["unet-out" if name == "sd15" else "vit-block0-out"]
    backbone = db.create_model(name, recipe=recipe, device="meta")
    with pytest.raises(ValueError, match=r"method='outputs' reads the networks of FLUX.1 and Stable Diffusion 3"):
        backbone.concepts(torch.empty(1, 3, 64, 64, device="meta"), "cat", method="outputs")
    with pytest.raises(ValueError, match="method must be one of 'attention', 'outputs', got 'values'"):
        backbone.concepts(torch.empty(1, 3, 64, 64, device="meta"), "cat", method="values")
