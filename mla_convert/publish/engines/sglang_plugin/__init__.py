"""SGLang's plugin: `sglang serve` of a converted folder, with its own sizes in each layer and the kernels of mla_attention.

SGLang calls `entry` in each of its processes. `options` prepares its settings, `pool` is the cache, `backend` the metadata of a
step, and `models` has the classes.
"""
