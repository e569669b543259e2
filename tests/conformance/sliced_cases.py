"""Documents with slices and modules; PARENTS stands for the folder of checkpoints.py's families of three layers."""

SLICED = {
    "all layers in one slice": """
merge_method: slerp
base_model: PARENTS/bf16/cos
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 3]}
  - {model: PARENTS/bf16/fmt, layer_range: [0, 3]}
parameters:
  t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]
dtype: float32
""",
    "a slice for each part": """
merge_method: slerp
base_model: PARENTS/bf16/cos
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 2]}
  - {model: PARENTS/bf16/fmt, layer_range: [0, 2]}
  parameters: {t: [0.2, 0.6]}
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [2, 3]}
  - {model: PARENTS/bf16/fmt, layer_range: [2, 3]}
parameters: {t: [0.1, 0.9]}
dtype: float32
""",
    "a stack of two models": """
merge_method: passthrough
slices:
- sources: [{model: PARENTS/bf16/cos, layer_range: [0, 2]}]
- sources: [{model: PARENTS/bf16/fmt, layer_range: [1, 3]}]
- sources: [{model: PARENTS/bf16/third, layer_range: [2, 3]}]
dtype: float32
""",
    "layers left out and scaled": """
merge_method: passthrough
base_model: PARENTS/bf16/base
slices:
- sources:
  - model: PARENTS/bf16/cos
    layer_range: [0, 1]
    parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.25}, {value: 1}]}
- sources: [{model: PARENTS/bf16/cos, layer_range: [2, 3]}]
dtype: float32
""",
    "ranges that differ between the sources": """
merge_method: linear
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
  - {model: PARENTS/bf16/fmt, layer_range: [1, 3]}
  parameters: {weight: 0.5}
- sources:
  - {model: PARENTS/bf16/fmt, layer_range: [0, 3]}
  residual_weight: 0.5
parameters: {weight: [{filter: mlp, value: [0.5, 0.75, 2]}, {value: 0.6}], normalize: [{filter: mlp, value: false}]}
dtype: float32
""",
    "every level of the parameters": """
merge_method: linear
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 3], parameters: {weight: [{filter: q_proj, value: 0.9}]}}
  - {model: PARENTS/bf16/fmt, layer_range: [0, 3], parameters: {weight: {filter: up_proj, value: [0.3, 0.1]}}}
  parameters: {weight: [{filter: mlp, value: 0.25}, {filter: layers.1., value: 3}]}
parameters: {weight: [{filter: layernorm, value: [1, 2]}, {value: 0.5}], normalize: false}
dtype: float32
""",
    "a base for each slice": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 1], parameters: {weight: 0.7}}
  - {model: PARENTS/bf16/base, layer_range: [1, 2]}
- sources:
  - {model: PARENTS/bf16/third, layer_range: [1, 3]}
  - {model: PARENTS/bf16/fmt, layer_range: [1, 3], parameters: {weight: [0.2, 0.4]}}
  base_model: PARENTS/bf16/third
parameters: {lambda: 0.9}
dtype: float32
""",
    "the first slice has another model than the last": """
merge_method: linear
slices:
- sources: [{model: PARENTS/untied/cos, layer_range: [0, 2], parameters: {weight: 1}}]
- sources:
  - {model: PARENTS/untied/fmt, layer_range: [2, 3], parameters: {weight: 0.25}}
  parameters: {normalize: false}
dtype: float32
""",
    "models of another depth": """
merge_method: passthrough
slices:
- sources: [{model: PARENTS/shallow/cos, layer_range: [0, 1]}]
- sources: [{model: PARENTS/bf16/fmt, layer_range: [1, 3]}]
dtype: float32
""",
    "ties of slices": """
merge_method: ties
base_model: PARENTS/fp32/base
slices:
- sources:
  - {model: PARENTS/fp32/base, layer_range: [0, 2]}
  - {model: PARENTS/fp32/cos, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.4}}
  - {model: PARENTS/fp32/fmt, layer_range: [1, 3], parameters: {weight: 0.5, density: [0.3, 0.7]}}
dtype: float32
""",
    "modules": """
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - {model: PARENTS/bf16/cos, layer_range: [0, 2], parameters: {weight: 0.7}}
      - {model: PARENTS/bf16/fmt, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 0.1}]}}
    parameters: {weight: [{filter: layers, value: [0.2, 0.5]}]}
parameters: {weight: 0.4}
dtype: float32
""",
    "a module of models": """
merge_method: linear
modules:
  default:
    models:
    - {model: PARENTS/bf16/cos, parameters: {weight: [0.7, 0.2]}}
    - {model: PARENTS/bf16/fmt}
    parameters: {weight: 0.3}
dtype: float32
""",
}
"""Slices that mergekit merges, in float32: there is no choice among equal magnitudes, and no middle to round from."""

SLICED_REFUSED = {
    "sources of other lengths": """
merge_method: linear
parameters: {weight: 1}
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 2]}
  - {model: PARENTS/bf16/fmt, layer_range: [0, 3]}
""",
    "a model twice in one slice": """
merge_method: linear
parameters: {weight: 1}
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 2]}
  - {model: PARENTS/bf16/cos, layer_range: [1, 3]}
""",
    "layers beyond the model": """
merge_method: passthrough
slices:
- sources: [{model: PARENTS/bf16/cos, layer_range: [2, 4]}]
""",
    "a base of other layers": """
merge_method: task_arithmetic
base_model: PARENTS/bf16/base
parameters: {weight: 1}
slices:
- sources:
  - {model: PARENTS/bf16/cos, layer_range: [0, 2]}
  - {model: PARENTS/bf16/fmt, layer_range: [1, 3]}
""",
    "models and slices": """
merge_method: passthrough
models: [{model: PARENTS/bf16/cos}]
slices:
- sources: [{model: PARENTS/bf16/cos, layer_range: [0, 3]}]
""",
    "a module that is not there": """
merge_method: passthrough
modules:
  encoder: {models: [{model: PARENTS/bf16/cos}]}
""",
}
"""Slices that both programs refuse."""
