"""Reduced inputs, found by fuzzing, that raised errors outside the hierarchy: (target, input)."""

DIGITS, DEEP = b"9" * 5000, b"[" * 100_000  # more than json.loads takes: ValueError, RecursionError
TOKENIZER = (
    b'{"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": {"type": "RobertaProcessing", '
    b'"sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": true, "add_prefix_space": false}, '
    b'"model": {"type": "BPE", "unk_token": "<unk>", "vocab": {"<s>": 0, "</s>": 2, %b}, "merges": []}}'
)
TEMPLATE = (
    b'{"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "post_processor": {"type": "TemplateProcessing", '
    b'"single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], '
    b'"pair": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, '
    b'{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}, '
    b'{"SpecialToken": {"id": "a", "type_id": 1}}], "special_tokens": {"a": {"id": "a", %b}}}, '
    b'"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 1}}}'
)

CASES: tuple[tuple[str, bytes], ...] = (
    ("config", b'{"model_type": "modernbert", "num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 48}'),
    ("config", b'{"model_type": "modernbert", "num_hidden_layers": 1e12, "num_attention_heads": 4, "hidden_size": 48}'),
    ("config", b'{"model_type": "modernbert", "num_hidden_layers": "99999999999", "num_attention_heads": 4}'),
    ("settings", b'[{"path": "", "type": "x.Transformer"}]\n---\n{"prompts": {}, "default_prompt_name": {}}'),
    ("settings", b'[{"path": "", "type": "x.Transformer"}]\n---\n{"prompts": {}, "default_prompt_name": []}'),
    ("settings", b'[{"path": "", "type": "x.Transformer"}, {"path": "elsewhere", "type": "x.Pooling"}, '
                 b'{"path": "2_Dense", "type": "x.Dense"}, {"path": "3_LayerNorm", "type": "x.LayerNorm"}, '
                 b'{"path": "4_Dense", "type": "x.Dense"}]'),
    ("settings", b'[{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}, '
                 b'{"path": "%b", "type": "x.Dense"}, {"path": "3_LayerNorm", "type": "x.LayerNorm"}, '
                 b'{"path": "4_Dense", "type": "x.Dense"}]' % (b"a" * 300)),
    ("safetensors", b"RAW\xff\xff\xff" + b"\0" * 5 + DEEP),
    ("tokenizer", TOKENIZER % b'"a": 5'),  # no unknown token: "b" cannot be encoded
    ("tokenizer", TOKENIZER % b'"a": 5, "b": 6'),
    ("tokenizer", TEMPLATE % b'"ids": [0, 1], "tokens": ["a"]'),
    ("tokenizer", TEMPLATE % b'"ids": [0], "tokens": ["a", "b"]'),
    ("tokenizer", TEMPLATE.replace(b'"a", "type_id": 1', b'"", "type_id": 1') % b'"ids": [0], "tokens": ["a"]'),
    ("tokenizer", TEMPLATE.replace(b'"type_id": 1}}]', b'"type_id": 2147483648}}]') % b'"ids": [0], "tokens": ["a"]'),
    ("tokenizer", TEMPLATE % b'"ids": [4294967295], "tokens": ["a"]'),
    ("tokenizer", TEMPLATE.replace(b'"b": 1', b'"red": 2147483648') % b'"ids": [0], "tokens": ["a"]'),
    ("beir", b'{"_id": "d1", "text": %b}\n---\n{"_id": "q", "text": "y"}\n---\nq\td1\t1' % DIGITS),
    ("beir", b'{"_id": "d1", "text": %b}\n---\n{"_id": "q", "text": "y"}\n---\nq\td1\t1' % DEEP),
    ("beir", b'{"_id": "d1", "text": "x"}\n---\n{"_id": "q", "text": %b}\n---\nq\td1\t1' % DIGITS),
    ("llamaindex", b'{"queries": %b}' % DIGITS),
    ("llamaindex", DEEP),
    ("chunks", b"question,references,corpus_id\nwhy,%b,bees\n" % DEEP),
    ("chunks", b"references,corpus_id\n[],bees\n"),
    ("chunks", b'question,references,corpus_id\nwhy,"[{""start_index"": 1e999, ""end_index"": 1}]",bees\n'),
    ("training", b'{"query": "q", "passage": "a", "label": 1%b}' % (b"0" * 400)),
    ("training", b'{"query": "q", "passage": "a", "score": 1%b}' % (b"0" * 400)),
    ("training", b'{"query": "q", "documents": "%b"}' % DEEP),
    ("jsonl", b'{"text": "a", "n": %b}' % DIGITS),
    ("calibration", DEEP),
    ("calibration", b'{"format": 1, "slope": 1, "intercept": 0, "weights": "%b", "pairs": 1, "relevant": 1, '
                    b'"curve": [[0, 1%b, 1]], "about": {}}' % (b"0" * 64, b"0" * 400)),
    ("calibration", b'{"format": 1, "slope": 1, "intercept": 0, "weights": 1, "pairs": 1, "relevant": 1, '
                    b'"curve": [[0, 1, 1]], "about": {}}'),
    ("calibration", b'{"format": 1, "slope": 1, "intercept": 0, "weights": "x", "pairs": 1, "relevant": 1, '
                    b'"curve": [[0, 1, Infinity]], "about": {}}'),
    ("calibration", b'{"format": 1, "slope": 1, "intercept": 1%b, "weights": "x", "pairs": 1, "relevant": 1, '
                    b'"curve": [[0, 1, 1]], "about": {}}' % (b"0" * 400)),
)  # fmt: skip
