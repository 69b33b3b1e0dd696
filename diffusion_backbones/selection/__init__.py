"""Which activations of a diffusion network make good features: the procedure of GDF (https://arxiv.org/abs/2410.03558,
section 5), measured.

::

    reach       what it takes to reach each activation
    measure     its properties on a few dozen images: noise, position, locality, granularity, redundancy
    rules       the filter: which are worth comparing, with the reason for every one that is not
    tasks       what they are compared on: masks, matched points, or known warps of the images themselves
    compare     the network looks once, then every activation is scored
    choose      a few that are good together, under a budget
    run         all of it in one folder, as ``diffusion-backbones select`` does

Each step stands alone; ``docs/selection.md`` explains them.
"""
