"""The backbone: an image in, a feature pyramid out; :mod:`~diffusion_backbones.backbone.pipeline` is the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_backbones.backbone import concepts as concept_maps
from diffusion_backbones.backbone import fitting, pipeline, save_pretrained
from diffusion_backbones.backbone.call_arguments import Call
from diffusion_backbones.backbone.timm_mixin import TimmMixin
from diffusion_backbones.ops import recording
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.levels import take
from diffusion_backbones.surgery import compilation, introspection, trainable


class DiffusionBackbone(TimmMixin):
    """A frozen diffusion network that returns a pyramid of its activations. Made by
    :func:`~diffusion_backbones.create_model`.

    Every method that runs the network takes these keywords, which hold for that call alone:

    * ``prompt``: a string for the batch, or one per image; or its embeddings under diffusers' names: ``prompt_embeds``
      (tokens, channels) or (B, tokens, channels), ``pooled_prompt_embeds``, ``prompt_attention_mask``,
      ``class_labels``.
    * ``labels``: a string, or one per image, in place of the ``{}`` of the prompt: ``prompt="a photo of a {}"``; where
      the recipe has classes as many strings in their place, or as many for each image.
    * ``timestep``: what the network receives, a number or one per image.
    * ``timesteps``: several of them, one pass each on the same noise, combined as the recipe says: averaged, or
      concatenated along channels, which takes as many as the recipe has.
    * ``noise``: ``"fixed"``, ``"random"``, ``"none"``, or a tensor of the latents' shape, (C, h, w) or (B, C, h, w);
      where the backbone was built so ``"inversion"``.
    * ``generator``: for ``noise="random"``.
    * ``ensemble``: number of noise draws to average.
    * ``chunk``: how many noisy latents, draws times images, the denoiser is run on at once; all by default. The
      features are the same, and the memory of a call no longer grows with its ensemble.
    * ``latents``: (B, C, h, w) clean latents in place of the image.

    See :class:`~diffusion_backbones.backbone.state.BackboneState` for its attributes.
    """

    def forward(self, x: Tensor | None = None, indices: int | Sequence[int] | None = None, **call: Any) -> list[Tensor]:
        """An image batch -> its feature pyramid.

        Args:
            x: (B, 3, H, W) floating point, normalized with mean = std = 0.5, that is in [-1, 1], or as ``input_format``
                says. Any H and W from 1 up. None only with ``latents=``.
            indices: Which maps, by position; an integer n means the last n. All by default.
            **call: See the class.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), fine to coarse, in the denoiser's dtype.

        Raises:
            TypeError: ``x`` is not a floating-point tensor, or an unknown keyword.
            ValueError: ``x`` has another shape, is empty, or has NaN; a keyword has a value that cannot be.
        """
        chosen, settings = take(indices, len(self.out_maps)), self._parse(call)
        self.check_found(chosen)
        latents = pipeline.start(self, x, settings, self.sites_of(chosen))
        return pipeline.feature_pyramid(self, latents, settings, chosen)

    def forward_latents(
        self,
        z: Tensor,
        size: tuple[int, int] | None = None,
        indices: int | Sequence[int] | None = None,
        **call: Any,
    ) -> list[Tensor]:
        """Clean latents, as :meth:`encode` gives them -> the feature pyramid.

        Args:
            z: (B, C, h, w), h and w multiples of ``size_divisibility`` / latent stride.
            size: Height and width in pixels of the image before it was padded; by default all of ``z``.
            indices, **call: As in :meth:`forward`.

        Returns:
            As :meth:`forward` of an image of that size.
        """
        chosen, settings = take(indices, len(self.out_maps)), self._parse(call)
        self.check_found(chosen)
        encoder_sites = [site for site in self.sites_of(chosen) if site.encoder]
        latents = pipeline.given_latents(self, z, size, encoder_sites)
        return pipeline.feature_pyramid(self, latents, settings, chosen)

    def encode(self, x: Tensor) -> Tensor:
        """Images -> the clean latents that the recipe's denoiser is given noise on.

        Args:
            x: As in :meth:`forward`.

        Returns:
            (B, C, h, w), padded to ``size_divisibility``, scaled as the recipe says, in the encoder's dtype.
        """
        return pipeline.encode(self, x)

    def forward_activations(
        self,
        x: Tensor | None,
        ids: Sequence[str],
        *,
        as_maps: bool = False,
        average_heads: bool = False,
        **call: Any,
    ) -> dict[str, Tensor]:
        """Single activations, exactly as the stock network computes them.

        Args:
            x: As in :meth:`forward`.
            ids: Activation ids or stock module paths that this network still computes.
            as_maps: Turn tokens into (B, C, h, w) and crop the padding off, instead of giving the raw tensor of the
                padded image.
            average_heads: Average attention maps over heads.
            **call: See the class.

        Returns:
            Id -> (B, C, h, w), or (B, h·w, C) for tokens, or (B, heads, h·w, keys) for attention maps; of several
            timesteps the mean, or all along C, heads, or keys if heads are averaged.

        Raises:
            KeyError: The network has no such activation, or it lies behind the point where this one is cut.
        """
        sites = [self._find(name) for name in ([ids] if isinstance(ids, str) else ids)]
        inner, settings = [site for site in sites if not site.encoder], self._parse(call)
        self.encoder_recorder.add_hooks(self.encoder, [site for site in sites if site.encoder])
        self.recorder.add_hooks(self.denoiser, inner)
        with compilation.eager_context(self):
            latents = pipeline.start(self, x, settings, sites)
            acts = latents.encoder_acts | pipeline.activations(self, latents, settings, inner, average_heads)
        if not as_maps:
            return acts
        maps = {s.id: pipeline.single_map(self, latents, s, acts[s.id]) for s in sites if s.layout != "attention"}
        return {site.id: maps.get(site.id, acts[site.id]) for site in sites}

    def visit_activations(
        self, x: Tensor | None, ids: Sequence[str], visit: Callable[[Site, Tensor], None], **call: Any
    ) -> None:
        """Single activations of the denoiser as maps, handed on one by one while it runs: however many they are, one is
        in memory.

        Args:
            x: As in :meth:`forward`.
            ids: As in :meth:`forward_activations`. Neither activations of the image encoder nor attention maps, which
                are not spatial maps.
            visit: Called with the site and its map (B, C, h, w), ensemble draws one after another along the batch, once
                for every id, in forward order; once for every id of each timestep, and of every chunk with ``chunk``.
            **call: See the class.

        Raises:
            KeyError: As in :meth:`forward_activations`.
            ValueError: An id that cannot be visited, or the network did not compute one.
        """
        sites, settings = [self._find(name) for name in ids], self._parse(call)
        if unfit := [site.id for site in sites if site.encoder or site.layout not in ("map", "tokens")]:
            raise ValueError(f"{', '.join(unfit)} cannot be visited; read such activations with forward_activations")
        self.recorder.add_hooks(self.denoiser, sites)
        latents = pipeline.start(self, x, settings, sites)
        with compilation.eager_context(self):
            pipeline.activations(
                self,
                latents,
                settings,
                sites,
                visit=lambda site, act: visit(site, pipeline.single_map(self, latents, site, act)),
            )

    def concepts(
        self,
        x: Tensor | None,
        words: str | Sequence[str],
        *,
        prompt: str | None = None,
        layers: Sequence[str] | None = None,
        raw: bool = False,
        method: str = "attention",
        **call: Any,
    ) -> Tensor:
        """Where concepts are in images, by the attention that the network pays from the image to words of its prompt.

        U-Nets are read as DAAM reads them (https://arxiv.org/abs/2210.04885): the mean over all heads of the
        cross-attention on the way down and up, enlarged to the latents. Transformers are read as Seg4Diff reads them
        (https://arxiv.org/abs/2509.18096): the mean over heads and layers of the attention from image to text. The
        tokens of a word are averaged.

        ``method="outputs"`` reads FLUX.1 and Stable Diffusion 3 as ConceptAttention (https://arxiv.org/abs/2502.04320)
        does: concepts are tokens of their own, which attend to the image and to each other, and whose outputs of
        attention are compared with those of the image.

        Args:
            x: As in :meth:`forward`.
            words: n different concepts, each a word or several.
            prompt: The text that they are read in, or a template with a ``{}`` in place of which they stand, joined by
                spaces. By default they are the prompt themselves. With ``method="outputs"`` they need not be in it.
            layers: Ids of maps of attention to the text; by default those of the recipe, or all where it has none. With
                ``method="outputs"`` ids of ``attn-out``; by default ConceptAttention's, the double blocks 15 to 18 of
                FLUX.1.
            raw: Give the mean probabilities, or dot products of outputs, in place of every map from its least value, 0,
                to its greatest, 1.
            method: ``"attention"`` or ``"outputs"``.
            **call: See the class.

        Returns:
            (B, n, ceil(H / s), ceil(W / s)) in the denoiser's dtype; the stride s is that of the latents in a U-Net,
            and that of its tokens in a transformer.

        Raises:
            FileNotFoundError: There is no text encoder or tokenizer: random weights, or a saved backbone.
            KeyError: The network has no such layer.
            TypeError: Concepts or prompt are no strings.
            ValueError: There are no concepts, or more than the text encoder takes; one is empty, there twice, cut off,
                or not in the prompt. The network does not look at a text, has no such outputs, or is cut before a
                layer.
        """
        text, site, beside = concept_maps.find(self, words, prompt, layers, method)
        settings = replace(self._parse({**call, "prompt": text}), combine="mean", beside=beside)
        self.recorder.add_hooks(self.denoiser, [site])
        with compilation.eager_context(self):
            latents = pipeline.start(self, x, settings, [])
            acts = pipeline.activations(self, latents, settings, [site])
        maps = pipeline.single_map(self, latents, site, acts[site.id])
        return maps if raw else concept_maps.stretched(maps)

    def _parse(self, call: Mapping[str, Any]) -> Call:
        return Call.parse(call, self.declaration.recipe, self.chunk, self.declaration.name, self.folded)

    def _find(self, name: str) -> Site:
        site = self.catalogue[name]
        if not recording.available(self.encoder if site.encoder else self.denoiser, site):
            checkpoint = self.declaration.checkpoint.name
            raise KeyError(
                f"{checkpoint} has {name!r}, but {self.declaration.name} is cut behind the last activation of its "
                "recipe and no longer computes it. Build a network that does: "
                f"create_model({checkpoint!r}, recipe=[{name!r}])."
            )
        return site

    def fit(self, images: Tensor | Iterable[Tensor] | None = None, **call: Any) -> DiffusionBackbone:
        """Fit what the recipe leaves to be fitted; it is saved with the backbone.

        ``components`` are fitted on images. ``discard="auto"`` and ``debias`` are found when a backbone is built with
        weights; they are found here for one whose weights were loaded later, and need no images.

        Args:
            images: A batch, or several, as :meth:`forward` takes them; sizes may differ.
            **call: See the class.

        Raises:
            ValueError: Images and nothing to fit on them, or the other way round; or too few places for so many
                components, or places that do not differ in so many directions. What was fitted before stays then.
        """
        fitting.fit(self, images, self._parse(call))
        return self

    # Cutting further, and staying frozen.

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Keep only some maps, and cut the denoiser behind the last activation that they need.

        Args:
            indices: As in :meth:`forward`.
            prune_norm, prune_head: Accepted; there is neither.

        Returns:
            The positions that were kept.
        """
        out = self.out_maps
        kept = take(indices, len(out))
        chosen = [out[i] for i in kept]
        self.out_strides = tuple(m.stride for m in chosen) if self.out_strides else None
        self.plan = replace(self.plan, levels=tuple(self.levels[i] for i in sorted({m.level for m in chosen})))
        self.plan.cut(self.denoiser)
        self.forget()
        trainable.unfreeze(self, self.trainable, introspection.unreached(self.plan) if self.trainable else ())
        if self.compiled:
            compilation.compile_in_place(self, self.compiled)
        return kept

    def train(self, mode: bool = True) -> DiffusionBackbone:
        """Only a trainable denoiser leaves eval; the encoder never does, whatever a framework calls, nor do networks
        whose prompt alone is trained.
        """
        super().train(False)
        self.training = mode and bool(self.trainable)
        self.denoiser.train(self.training and self.trainable != "prompt")
        return self

    # Saving and loading, by huggingface_hub's names for it.

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
        """Write what was kept: weights, embedded prompt, recipe, configs and card. Returns the folder.

        :meth:`from_pretrained` and ``create_model("local-dir:FOLDER")`` read it back with no text encoder and no hub,
        in the dtype that they are asked for. Until every file is written the folder stays as it was; what an earlier
        save left there is replaced.

        Args:
            folder: Made if it does not exist.
            max_shard_size: Bytes, or a string such as ``"500MB"``. Larger weights are split into several files.

        Raises:
            ValueError: The backbone is on ``meta``, or has a ``weight_dtype``; or ``max_shard_size`` is not a size, or
                ``folder`` empty.
            FileExistsError: The folder holds the config or the weights of something else. A ``README.md`` of something
                else stays as it is.
            OSError: The folder cannot be written.
        """
        return save_pretrained.save(self, folder, max_shard_size)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload backbone",
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> str:
        """:meth:`save_pretrained` into a hub repository, created if it is not there.

        The weights keep their licence, which the uploaded card states; see whether it lets you redistribute them.

        Args:
            repo_id: ``owner/name``.
            private: Whether a repository that is created is private; None leaves it to the owner's settings.
            commit_message: Title of the commit.
            token: In place of the one that ``hf auth login`` stored.
            revision: Branch, created if it is not there; ``main`` by default.
            create_pr: Open a pull request with the commit instead.
            max_shard_size: As in :meth:`save_pretrained`.

        Returns:
            The URL of the repository, or of the pull request.

        Raises:
            ConnectionError: The hub cannot be reached, or does not let this token write there; nothing was uploaded.
            ValueError: As in :meth:`save_pretrained`.
        """
        return save_pretrained.push(
            self,
            repo_id,
            private=private,
            commit_message=commit_message,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
        )

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **keywords: Any,
    ) -> DiffusionBackbone:
        """Build what :meth:`save_pretrained` or :meth:`push_to_hub` wrote; with ``recipe=``, also a checkpoint in the
        diffusers layout.

        Args:
            pretrained_model_name_or_path: A folder, or ``owner/repo`` on the hub.
            revision: Branch, tag or commit; ``main`` by default.
            cache_dir: huggingface_hub's cache folder.
            token: In place of the one that ``hf auth login`` stored; False for none.
            local_files_only: Use what is cached and ask no hub.
            **keywords: Those of :func:`~diffusion_backbones.create_model`, such as ``dtype`` and ``out_indices``.

        Raises:
            ConnectionError: The hub does not give it, or it is not in the cache.
            FileNotFoundError: There is neither such a folder nor can it be the name of a repository.
            TypeError: An unknown keyword; ``revision`` of a folder.
            ValueError: The folder or repository is not what :meth:`save_pretrained` writes.
        """
        backbone: DiffusionBackbone = save_pretrained.load(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            **keywords,
        )
        return backbone
