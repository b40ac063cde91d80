"""From a language model to its flat graph: one node an operator, as the model card has them."""

from __future__ import annotations

import numpy as np

from qigen.errors import Unsupported, UsageError
from qigen.frontends.model import ExpertsConfig, LanguageModel, RopeConfig
from qigen.ir.graph import Graph, State


def build_graph(model: LanguageModel, max_seq: int | None = None) -> Graph:
    """The graph of a step: ``input_ids [T]``, ``positions [T]``, ``rows [R]`` -> ``logits [R,V]``.

    ``max_seq`` is the number of positions that the compiled model will hold (default: what the
    model was made for); longrope models have other frequencies for long contexts. Matrices enter
    as lazy handles, vectors are read. ``meta['config']`` is the ModelConfig, ``meta['max_seq']``
    the number. Raises UsageError if the model cannot hold so many positions, BadInput for damaged
    weights.
    """
    config = model.config
    max_seq = config.max_position if max_seq is None else max_seq
    if not 1 <= max_seq <= config.max_position:
        raise UsageError(
            f"{max_seq} positions are outside of what the model was made for "
            f"(1 to {config.max_position})"
        )
    graph = Graph(model.metadata.name, meta={"config": config, "max_seq": max_seq})
    builder = _Builder(model, graph, max_seq)
    if model.tensors["token_embd.weight"].columns is not None:
        raise Unsupported("an embedding with reordered columns has no kernel", "token_embd.weight")
    ids = graph.add_input("input_ids", ("T",), "i32")
    graph.add_input("positions", ("T",), "i32")
    rows = graph.add_input("rows", ("R",), "i32")
    x = graph.add(
        "Embedding",
        ids,
        builder.constant("token_embd.weight"),
        name="embedding",
        scale=config.embedding_scale,
    )
    for layer in range(config.n_layers):
        x = builder.layer(x, layer)
    x = graph.add("SelectRows", x, rows, name="last_rows")
    x = graph.add(
        "RMSNorm",
        x,
        builder.constant("output_norm.weight"),
        name="output_norm",
        eps=config.norm_eps,
    )
    table = "token_embd.weight" if config.tied_embeddings else "output.weight"
    capped = config.final_softcap > 0.0
    x = builder.ordered(x, table)
    x = graph.add("MatMul", x, builder.constant(table), name="output" if capped else "logits")
    if capped:
        x = graph.add("Softcap", x, name="logits", cap=config.final_softcap)
    graph.outputs.append(x)
    return graph


class _Builder:
    def __init__(self, model: LanguageModel, graph: Graph, max_seq: int) -> None:
        self.model = model
        self.graph = graph
        self.config = model.config
        self.max_seq = max_seq
        self._ordered: dict[tuple[str, bytes], str] = {}

    def constant(self, name: str) -> str:
        """Add a tensor of the model once."""
        if name not in self.graph.constants:
            handle = self.model.tensors[name]
            data = handle if len(handle.shape) == 2 else handle.load()
            self.graph.add_constant(name, data)
        return name

    def ordered(self, x: str, weight: str, layer: int | None = None) -> str:
        """``x`` with its columns in the order of the weight's; the same order is made once."""
        order = self.model.tensors[weight].columns
        if order is None:
            return x
        order = order.astype(np.int32)
        key = x, order.tobytes()
        if key not in self._ordered:
            stem = weight.removesuffix(".weight")
            columns = self.graph.add_constant(f"{stem}.columns", order)
            self._ordered[key] = self.graph.add(
                "SelectColumns", x, columns, name=f"{stem}.ordered", layer=layer
            )
        return self._ordered[key]

    def factors(self, rope: RopeConfig) -> list[str]:
        """The frequency factors as a constant: a list of one name, or of none."""
        values = rope.factors_for(self.max_seq)
        if values is None:
            return []
        # Only the main rope of a model has factors, so one constant serves all layers.
        if "rope_factors" not in self.graph.constants:
            self.graph.add_constant("rope_factors", np.array(values, dtype=np.float32))
        return ["rope_factors"]

    def layer(self, x: str, layer: int) -> str:
        """Add a decoder layer that reads the residual stream ``x``; returns the new stream."""
        graph, config = self.graph, self.config
        prefix = f"blk.{layer}"

        def norm(x: str, stem: str, head_dim: int = 0) -> str:
            name = f"{prefix}.{stem}"
            return graph.add(
                "RMSNorm",
                x,
                self.constant(f"{name}.weight"),
                name=name,
                layer=layer,
                eps=config.norm_eps,
                head_dim=head_dim,
            )

        def project(x: str, stem: str) -> str:
            name = f"{prefix}.{stem}"
            bias = [self.constant(f"{name}.bias")] if stem in config.biases else []
            weight = f"{name}.weight"
            x = self.ordered(x, weight, layer)
            return graph.add("MatMul", x, self.constant(weight), *bias, name=name, layer=layer)

        def rotate(x: str, stem: str) -> str:
            rope = config.rope_of(layer)
            return graph.add(
                "Rope",
                x,
                "positions",
                *self.factors(rope),
                name=f"{prefix}.{stem}",
                layer=layer,
                head_dim=config.head_dim,
                rotary_dim=rope.rotary_dim,
                base=rope.base,
                style=rope.style,
                position_scale=rope.position_scale,
                attn_factor=rope.attn_factor,
            )

        def add(x: str, y: str, stem: str) -> str:
            return graph.add("Add", x, y, name=f"{prefix}.{stem}", layer=layer)

        h = norm(x, "attn_norm")
        q, k, v = project(h, "attn_q"), project(h, "attn_k"), project(h, "attn_v")
        if config.qk_norm:
            q = norm(q, "attn_q_norm", config.head_dim)
            k = norm(k, "attn_k_norm", config.head_dim)
        state = graph.add_state(State(f"kv.{layer}", "kv", config.n_kv_heads, config.head_dim))
        window = config.window_of(layer)
        window = window if window < self.max_seq else 0  # a wider one sees every position
        written = graph.add(
            "KVAppend",
            rotate(k, "rope_k"),
            v,
            "positions",
            name=f"{prefix}.kv",
            layer=layer,
            state=state,
        )
        h = graph.add(
            "Attention",
            rotate(q, "rope_q"),
            written,
            "positions",
            *([self.constant(f"{prefix}.attn_sinks.weight")] if config.sinks else []),
            name=f"{prefix}.attention",
            layer=layer,
            state=state,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            scale=config.attn_scale,
            window=window,
            softcap=config.attn_softcap,
        )
        h = project(h, "attn_output")
        if config.post_norms:
            h = norm(h, "post_attention_norm")
        x = add(x, h, "attn_residual")
        h = norm(x, "ffn_norm")
        if config.experts is not None:
            h = self.experts(h, project(h, "ffn_gate_inp"), config.experts, layer)
        else:
            h = graph.add(
                "GatedAct",
                project(h, "ffn_gate"),
                project(h, "ffn_up"),
                name=f"{prefix}.ffn_act",
                layer=layer,
                kind=config.activation,
            )
            h = project(h, "ffn_down")
        if config.post_norms:
            h = norm(h, "post_ffw_norm")
        return add(x, h, "ffn_residual")

    def experts(self, x: str, logits: str, experts: ExpertsConfig, layer: int) -> str:
        """Add the experts of a layer, which the router's ``logits`` choose for every row of x."""
        prefix = f"blk.{layer}"
        gates = self.graph.add(
            "Router",
            logits,
            name=f"{prefix}.router",
            layer=layer,
            k=experts.used,
            softmax=experts.softmax,
        )
        stems = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        biases = [stem in self.config.biases for stem in stems]
        if any(biases) != all(biases):
            raise Unsupported(
                "experts of which some products have a bias and others have none are not supported",
                f"{prefix}.{stems[biases.index(False)]}",
            )
        constants = [
            self.constant(f"{prefix}.{stem}.{e}.{kind}")
            for kind in ("weight", "bias")[: 1 + biases[0]]
            for stem in stems
            for e in range(experts.count)
        ]
        for name in constants:
            if self.model.tensors[name].columns is not None:
                raise Unsupported("an expert with reordered columns has no kernel", name)
        return self.graph.add(
            "Experts",
            x,
            gates,
            *constants,
            name=f"{prefix}.experts",
            layer=layer,
            n_experts=experts.count,
            biases=biases[0],
            act=experts.act,
            alpha=experts.alpha,
            limit=experts.limit,
        )
