"""Keywords of diffusers, transformers and huggingface_hub that people bring to ``create_model``, and what stands for
each here.
"""

from __future__ import annotations

from collections.abc import Mapping

_PART = (
    "a part of another checkpoint is given as a folder in the diffusers layout that holds this part alone, in its own "
    "sub-folder such as vae/: checkpoint_path=FOLDER, with pretrained=True for the rest"
)
_NO_PART = "a backbone has no such part; leave it out"
_NO_PICTURE = "a backbone reads features and makes no picture; leave it out"
_DTYPE = "dtype= says in which precision weights and maps are, such as dtype='float16'"
_DEVICE = "device= says where the backbone is built"
_LAZY = "only the weights that are kept are read, one at a time, so there is nothing to set; leave it out"
_CACHE = "the files are huggingface_hub's: `hf download OWNER/REPO` has such options, and cache_dir= names the cache"
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"
_INT8 = "weight_dtype='int8' keeps the denoiser's weights in eight bits"
_CODE = "no code of a repository is run; leave it out"
_CONFIG = (
    "configs are those of the checkpoint; for other ones give a folder in the diffusers layout as checkpoint_path="
)
_NAME = "the first argument names the checkpoint, such as 'hf-hub:OWNER/REPO' or 'local-dir:FOLDER' with recipe="

COUNTERPARTS: Mapping[str, str] = {
    "torch_dtype": _DTYPE,
    "precision": _DTYPE,
    "variant": (
        "the files are chosen by dtype=: 16 bits prefer the fp16 variant, 32 bits the full one, and the only variant "
        "that is there is taken"
    ),
    "revision": "a revision is part of the name: 'hf-hub:OWNER/REPO@REVISION', with recipe=",
    "subfolder": (
        "checkpoint_path= takes the sub-folder itself, such as FOLDER/unet, with pretrained=True for what it lacks"
    ),
    "use_safetensors": "nothing but .safetensors is read; leave it out",
    "local_files_only": ("without pretrained=True nothing is fetched; with it, HF_HUB_OFFLINE=1 reads the cache alone"),
    **dict.fromkeys(("token", "use_auth_token"), _TOKEN),
    **dict.fromkeys(("force_download", "resume_download", "proxies", "mirror", "local_dir"), _CACHE),
    **dict.fromkeys(("vae", "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"), _PART),
    **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), _PART),
    "scheduler": (
        "the schedule is read from scheduler/scheduler_config.json of the checkpoint; timestep= and noise= say how "
        "much noise there is"
    ),
    **dict.fromkeys(
        ("safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder", "add_watermarker"), _NO_PART
    ),
    **dict.fromkeys(("device_map", "max_memory"), _DEVICE),
    **dict.fromkeys(
        ("low_cpu_mem_usage", "offload_folder", "offload_state_dict", "disable_mmap", "use_flashpack"), _LAZY
    ),
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _INT8),
    **dict.fromkeys(("custom_pipeline", "custom_revision", "trust_remote_code"), _CODE),
    **dict.fromkeys(("config", "original_config", "original_config_file", "num_in_channels"), _CONFIG),
    **dict.fromkeys(
        ("pretrained_model_name_or_path", "pretrained_model_link_or_path", "model_id", "repo_id", "model_name"), _NAME
    ),
    **dict.fromkeys(
        ("guidance_scale", "num_images_per_prompt", "output_type", "callback_on_step_end", "negative_prompt"),
        _NO_PICTURE,
    ),
    "num_inference_steps": "the network runs once a timestep; timestep= says which",
    "strength": "timestep= says how much noise is mixed in, from 0 for none to 1000",
    "generator": "seed= chooses the fixed noise, and a call takes generator= with noise='random'",
    **dict.fromkeys(("height", "width", "image_size"), "a backbone takes images of any size; leave it out"),
    "attn_implementation": "the network keeps diffusers' own attention; leave it out",
    "ignore_mismatched_sizes": "weights that do not fit the network are refused; leave it out",
    **dict.fromkeys(("weights", "pretrained_backbone"), "pretrained=True takes the published weights"),
    **dict.fromkeys(
        ("checkpoint", "ckpt_path", "model_path", "state_dict"),
        "checkpoint_path= takes a folder or a .safetensors file",
    ),
    **dict.fromkeys(
        ("out_features", "return_nodes"), "recipe= takes a list of activation ids, and out_indices= chooses levels"
    ),
}
"""Keyword -> a clause that says what does its work here."""
