"""Names of graph inputs and outputs that the exporter writes and the backends bind."""

#: int64 [kept]: positions among the step's new tokens whose logits are computed; -1 is the last one.
LOGITS_TO_KEEP = "logits_to_keep"
#: int64 [batch, kept], or [batch, 1]: the next token behind each position kept, chosen in the graph.
NEXT_TOKENS = "next_tokens"
#: int64 [batch]: valid positions of each row behind the step; the next step's `past_lengths`.
NEXT_LENGTHS = "next_lengths"
#: int32 [batch]: the next step's `seqlens_k`, in the graph for CUDA.
NEXT_SEQLENS = "next_seqlens_k"
#: int64 [batch]: valid positions of each row before the step.
PAST_LENGTHS = "past_lengths"
#: float32 [batch].
TEMPERATURE = "temperature"
#: int64 [batch]: 1 takes the likeliest token, 0 is off.
TOP_K = "top_k"
#: float32 [batch].
TOP_P = "top_p"
#: float32 [batch, cache], uniform in [0, 1): the step whose last written position is p chooses with noise[:, p].
NOISE = "noise"
#: The most tokens of a row that a choice in the graph draws from.
TOP_K_LIMIT = 256
