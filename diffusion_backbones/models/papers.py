"""The publications that introduced the checkpoints and chose the recipes."""

from diffusion_backbones.spec.checkpoint import Paper

_NEURIPS = "Advances in Neural Information Processing Systems"
_CVPR = "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition"

# Checkpoints

LDM = Paper(
    key="rombach2022ldm",
    title="High-Resolution Image Synthesis With Latent Diffusion Models",
    authors="Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Björn",
    venue=_CVPR,
    year=2022,
    arxiv="2112.10752",
)

SDXL = Paper(
    key="podell2023sdxl",
    title="SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
    authors="Podell, Dustin and English, Zion and Lacey, Kyle and Blattmann, Andreas and Dockhorn, Tim and Müller, "
    "Jonas and Penna, Joe and Rombach, Robin",
    venue="",
    year=2023,
    arxiv="2307.01952",
)

ADD = Paper(
    key="sauer2024add",
    title="Adversarial Diffusion Distillation",
    authors="Sauer, Axel and Lorenz, Dominik and Blattmann, Andreas and Rombach, Robin",
    venue="European Conference on Computer Vision",
    year=2024,
    arxiv="2311.17042",
)

PLAYGROUND = Paper(
    key="playgroundv2",
    title="Playground v2",
    authors="Li, Daiqing and Kamko, Aleks and Sabet, Ali and Akhgari, Ehsan and Xu, Linmiao and Doshi, Suhail",
    venue="",
    year=2023,
    url="https://huggingface.co/playgroundai/playground-v2-1024px-aesthetic",
)

SSD = Paper(
    key="gupta2024progressive",
    title="Progressive Knowledge Distillation Of Stable Diffusion XL Using Layer Level Loss",
    authors="Gupta, Yatharth and Jaddipal, Vishnu V. and Prabhala, Harish and Paul, Sayak and Von Platen, Patrick",
    venue="",
    year=2024,
    arxiv="2401.02677",
)

DIT = Paper(
    key="peebles2023dit",
    title="Scalable Diffusion Models with Transformers",
    authors="Peebles, William and Xie, Saining",
    venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
    year=2023,
    arxiv="2212.09748",
)

PIXART_ALPHA = Paper(
    key="chen2023pixartalpha",
    title="PixArt-α: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
    authors="Chen, Junsong and Yu, Jincheng and Ge, Chongjian and Yao, Lewei and Xie, Enze and Wu, Yue and Wang, "
    "Zhongdao and Kwok, James and "
    "Luo, Ping and Lu, Huchuan and Li, Zhenguo",
    venue="",
    year=2023,
    arxiv="2310.00426",
)

PIXART_SIGMA = Paper(
    key="chen2024pixartsigma",
    title="PixArt-Σ: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation",
    authors="Chen, Junsong and Ge, Chongjian and Xie, Enze and Wu, Yue and Yao, Lewei and Ren, Xiaozhe and Wang, "
    "Zhongdao and Luo, Ping and "
    "Lu, Huchuan and Li, Zhenguo",
    venue="",
    year=2024,
    arxiv="2403.04692",
)

SD3 = Paper(
    key="esser2024sd3",
    title="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    authors="Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and Müller, Jonas and Saini, "
    "Harry and Levi, Yam and "
    "Lorenz, Dominik and Sauer, Axel and Boesel, Frederic and Podell, Dustin and Dockhorn, Tim and English, Zion and "
    "Lacey, Kyle and "
    "Goodwin, Alex and Marek, Yannik and Rombach, Robin",
    venue="International Conference on Machine Learning",
    year=2024,
    arxiv="2403.03206",
)

FLUX = Paper(
    key="flux2024",
    title="FLUX",
    authors="{Black Forest Labs}",
    venue="",
    year=2024,
    url="https://github.com/black-forest-labs/flux",
)

# Recipes

HUNYUAN_DIT = Paper(
    key="li2024hunyuandit",
    title="Hunyuan-DiT: A Powerful Multi-Resolution Diffusion Transformer with Fine-Grained Chinese Understanding",
    authors="Li, Zhimin and Zhang, Jianwei and Lin, Qin and others",
    venue="",
    year=2024,
    arxiv="2405.08748",
)

DDPM = Paper(
    key="ho2020ddpm",
    title="Denoising Diffusion Probabilistic Models",
    authors="Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
    venue="Advances in Neural Information Processing Systems",
    year=2020,
    arxiv="2006.11239",
)

FLUX2 = Paper(
    key="flux2",
    title="FLUX.2",
    authors="{Black Forest Labs}",
    venue="",
    year=2025,
    url="https://github.com/black-forest-labs/flux2",
)

QWEN_IMAGE = Paper(
    key="wu2025qwenimage",
    title="Qwen-Image Technical Report",
    authors="{Qwen Team}",
    venue="",
    year=2025,
    arxiv="2508.02324",
)

DEEPFLOYD_IF = Paper(
    key="deepfloyd2023if",
    title="DeepFloyd-IF",
    authors="Shonenkov, Alex and Konstantinov, Misha and Bakshandaeva, Daria and Schuhmann, Christoph and Ivanova, "
    "Ksenia and Klokova, Nadiia",
    venue="",
    year=2023,
    url="https://github.com/deep-floyd/IF",
)

SANA = Paper(
    key="xie2024sana",
    title="SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers",
    authors="Xie, Enze and Chen, Junsong and Chen, Junyu and Cai, Han and Tang, Haotian and Lin, Yujun and Zhang, "
    "Zhekai and Li, Muyang "
    "and Zhu, Ligeng and Lu, Yao and Han, Song",
    venue="",
    year=2024,
    arxiv="2410.10629",
)

LUMINA_IMAGE_2 = Paper(
    key="qin2025lumina",
    title="Lumina-Image 2.0: A Unified and Efficient Image Generative Framework",
    authors="Qin, Qi and Zhuo, Le and Xin, Yi and Du, Ruoyi and Li, Zhen and Fu, Bin and Lu, Yiting and Li, Xinyue "
    "and Liu, Dongyang and Zhu, Xiangyang "
    "and Beddow, Will and Millon, Erwann and Perez, Victor and Wang, Wenhai and Qiao, Yu and Zhang, Bo and Liu, "
    "Xiaohong and Li, Hongsheng and Xu, Chang "
    "and Gao, Peng",
    venue="",
    year=2025,
    arxiv="2503.21758",
)

Z_IMAGE = Paper(
    key="zimage2025",
    title="Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer",
    authors="{Z-Image Team}",
    venue="",
    year=2025,
    arxiv="2511.22699",
)

DDAE = Paper(
    key="xiang2023ddae",
    title="Denoising Diffusion Autoencoders are Unified Self-supervised Learners",
    authors="Xiang, Weilai and Yang, Hongyu and Huang, Di and Wang, Yunhong",
    venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
    year=2023,
    arxiv="2303.09769",
)

DITF = Paper(
    key="gan2025ditf",
    title="Unleashing Diffusion Transformers for Visual Correspondence by Modulating Massive Activations",
    authors="Gan, Chaofan and Tu, Yuanpeng and Chen, Xi and Chen, Tieyuan and Li, Yuxi and Harandi, Mehrtash and Lin, "
    "Weiyao",
    venue="Advances in Neural Information Processing Systems",
    year=2025,
    arxiv="2505.18584",
)

SEG4DIFF = Paper(
    key="kim2025seg4diff",
    title="Seg4Diff: Unveiling Open-Vocabulary Segmentation in Text-to-Image Diffusion Transformers",
    authors="Kim, Chaehyun and Shin, Heeseong and Hong, Eunbeen and Yoon, Heeji and Arnab, Anurag "
    "and Seo, Paul Hongsuck and Hong, Sunghwan and Kim, Seungryong",
    venue="Advances in Neural Information Processing Systems",
    year=2025,
    arxiv="2509.18096",
)

GDF = Paper(
    key="meng2024gdf",
    title="Not All Diffusion Model Activations Have Been Evaluated as Discriminative Features",
    authors="Meng, Benyuan and Xu, Qianqian and Wang, Zitai and Cao, Xiaochun and Huang, Qingming",
    venue=_NEURIPS,
    year=2024,
    arxiv="2410.03558",
)

DIFT = Paper(
    key="tang2023emergent",
    title="Emergent Correspondence from Image Diffusion",
    authors="Tang, Luming and Jia, Menglin and Wang, Qianqian and Phoo, Cheng Perng and Hariharan, Bharath",
    venue=_NEURIPS,
    year=2023,
    arxiv="2306.03881",
)

CLEANDIFT = Paper(
    key="stracke2025cleandift",
    title="CleanDIFT: Diffusion Features without Noise",
    authors="Stracke, Nick and Baumann, Stefan Andreas and Bauer, Kolja and Fundel, Frank and Ommer, Björn",
    venue=_CVPR,
    year=2025,
    arxiv="2412.03439",
)

HYPERFEATURES = Paper(
    key="luo2023dhf",
    title="Diffusion Hyperfeatures: Searching Through Time and Space for Semantic Correspondence",
    authors="Luo, Grace and Dunlap, Lisa and Park, Dong Huk and Holynski, Aleksander and Darrell, Trevor",
    venue=_NEURIPS,
    year=2023,
    arxiv="2305.14334",
)

SD_DINO = Paper(
    key="zhang2023tale",
    title="A Tale of Two Features: Stable Diffusion Complements DINO for Zero-Shot Semantic Correspondence",
    authors="Zhang, Junyi and Herrmann, Charles and Hur, Junhwa and Cabrera, Luisa Polania and Jampani, Varun and "
    "Sun, Deqing and Yang, Ming-Hsuan",
    venue=_NEURIPS,
    year=2023,
    arxiv="2305.15347",
)

ODISE = Paper(
    key="xu2023odise",
    title="Open-Vocabulary Panoptic Segmentation with Text-to-Image Diffusion Models",
    authors="Xu, Jiarui and Liu, Sifei and Vahdat, Arash and Byeon, Wonmin and Wang, Xiaolong and De Mello, Shalini",
    venue=_CVPR,
    year=2023,
    arxiv="2303.04803",
)

VPD = Paper(
    key="zhao2023unleashing",
    title="Unleashing Text-to-Image Diffusion Models for Visual Perception",
    authors="Zhao, Wenliang and Rao, Yongming and Liu, Zuyan and Liu, Benlin and Zhou, Jie and Lu, Jiwen",
    venue="Proceedings of the IEEE/CVF International Conference on Computer Vision",
    year=2023,
    arxiv="2303.02153",
)

TADP = Paper(
    key="kondapaneni2024tadp",
    title="Text-image Alignment for Diffusion-based Perception",
    authors="Kondapaneni, Neehar and Marks, Markus and Knott, Manuel and Guimaraes, Rogerio and Perona, Pietro",
    venue=_CVPR,
    year=2024,
    arxiv="2310.00031",
)

DIFFCUT = Paper(
    key="couairon2024diffcut",
    title="DiffCut: Catalyzing Zero-Shot Semantic Segmentation with Diffusion Features and Recursive Normalized Cut",
    authors="Couairon, Paul and Shukor, Mustafa and Haugeard, Jean-Emmanuel and Cord, Matthieu and Thome, Nicolas",
    venue=_NEURIPS,
    year=2024,
    arxiv="2406.02842",
)

GENPERCEPT = Paper(
    key="xu2025genpercept",
    title="What Matters When Repurposing Diffusion Models for General Dense Perception Tasks?",
    authors="Xu, Guangkai and Ge, Yongtao and Liu, Mingyu and Fan, Chengxiang and Xie, Kangyang and Zhao, Zhiyue and "
    "Chen, Hao and Shen, Chunhua",
    venue="International Conference on Learning Representations",
    year=2025,
    arxiv="2403.06090",
)
