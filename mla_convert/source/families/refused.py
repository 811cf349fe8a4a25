"""Causal model types of transformers that cannot be converted, and the reason. A type with a file in this folder is supported."""

# Models that have latent attention already: transformers' model types, and those of models with their own code.
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_linear", "longcat_flash", "minicpm3",
          "glm4_moe_lite", "glm_moe_dsa", "mistral4", "youtu", "axk1", "axk2", "sarvam_mla", "hy_v4", "dots3_note_text",
          "bailing_hybrid")  # fmt: skip

# Reason -> types.
REASONS = {
    "its attention has a bias by distance (ALiBi) instead of RoPE or learned positions": ("bloom", "mpt"),
    "layers attend to the keys and values of other layers": ("gemma4_assistant", "gemma4_unified_assistant"),
    "it subtracts two attentions with one key for two heads of values": ("diffllama",),
    "its projections quantise their inputs and weights (1.58 bits), and a norm stands between them and the output projection": (
        "bitnet",),
    "it clips queries, keys and values, which no linear map of a latent does": ("dbrx",),
    "the heads of its values have another width than those of its keys, and layers differ in their number": (
        "mimo_v2_flash",),
    "layers differ in their number of query heads": ("laguna",),
    "each token chooses the query heads that it uses": ("jetmoe",),
    "its attention masks keys by their values": ("doge",),
    "its attention chooses its keys by an index, with a cache of its own": ("minimax_m3_vl_text",),
    "it caches one compressed head that is key and value in one, and drops most tokens": ("deepseek_v4",),
    "its keys and values pass convolutions over earlier tokens": ("zaya", "inkling_text", "inkling2_text",
                                                                  "inkling2_loop_text"),
    "it runs the same layers several times, each time with a cache of its own": ("dory", "hrm_text"),
    "queries grow with their position, and a gate with a bias for each head follows its attention": ("beam",),
    "its attention masks a local window by itself, not by transformers' mask": ("gpt_neo",),
    "its attention returns a bias to its layer": ("gpt_neox_japanese",),
    "its attention takes the mask of the whole batch only": ("xglm",),
    "a prediction head stands between its last norm and its output embeddings": ("modernbert-decoder",),
    "its configuration is that of another family under a new name": ("exaone", "internlm3", "iquestcoder", "sarvam_moe",
                                                                     "gpt-sw3"),
    "its recurrent or convolutional layers are not supported": (
        "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "lfm3", "granitemoehybrid",
        "falcon_h1", "nemotron_h", "jamba", "bamba", "olmo_hybrid", "recurrent_gemma", "zamba", "zamba2", "minimax", "lara_mini",
        "qwen4_exp", "qwen4_exp_text"),
    "it has no attention, so that its cache does not grow with the context": ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
    "its attention is older than the interface of transformers, and has no cache or one of its own": (
        "openai-gpt", "ctrl", "xlm", "xlnet", "reformer", "cpmant"),
    "it is an encoder with a causal head, and attends in both directions": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
        "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    "it is the decoder of an encoder and decoder, and has a cross-attention": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "prophetnet",
        "trocr", "whisper"),
    "it models audio or images, not text alone": (
        "blt", "emu3", "dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git",
        "llama4", "got_ocr2", "mllama", "moshi", "moss_transcribe_diarize", "musicgen",
        "musicgen_melody", "phi4_multimodal"),
}  # fmt: skip
