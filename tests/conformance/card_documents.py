"""Whole documents in the forms in which model cards and tutorials write them, as text: both programs read the YAML.

The parents of most are float32, so that no equal magnitudes leave a choice. Slices keep the number of layers: for
another one of Qwen2, mergekit writes a config that transformers refuses.
"""

CARDS = {
    "slerp of the tutorials": """
# the layers of both models
slices:
  - sources:
      - model: PARENTS/fp32/cos
        layer_range: [0, 3]
      - model: PARENTS/fp32/fmt
        layer_range: [0, 3]
merge_method: slerp
base_model: PARENTS/fp32/cos
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, .7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
""",
    "ties with anchors, strings and numbers for booleans": """
anchors: &half
  weight: 0.5
  density: 0.6
models:
  - model: PARENTS/fp32/base
    # no parameters necessary for base model
  - model: "PARENTS/fp32/cos"
    parameters: *half
  - model: PARENTS/fp32/fmt
    parameters:
      <<: *half
      weight: '0.25'
merge_method: ties
base_model: &base PARENTS/fp32/base
parameters: {normalize: 1, int8_mask: 1.0}
dtype: float32
lazy_unpickle: true
random_seed: 0
""",
    "float64, a weight of true, and a folder @main": """
models:
  - model: PARENTS/fp32/cos@main
    parameters: {weight: true}
  - model: PARENTS/fp32/fmt
    parameters: {weight: 0.3}
merge_method: linear
dtype: float64
""",
    "a self-merge with constants under one key": """
const_tag: &MODEL PARENTS/fp32/cos
const_tag: &RESIDUAL_SCALE_FACTOR 0.5
const_tag: &QK_ATTENUATION_FACTOR 0.8408964153
const_tag: &OUT_FACTOR 0.9
scale-filter-env: &scale_filter_env
  parameters:
    scale:
      - filter: o_proj
        value: *RESIDUAL_SCALE_FACTOR
      - filter: down_proj
        value: *RESIDUAL_SCALE_FACTOR
      - filter: q_proj
        value: *QK_ATTENUATION_FACTOR
      - filter: k_proj
        value: *QK_ATTENUATION_FACTOR
      - value: 1.0
slices:
  - sources:
      - model: *MODEL
        layer_range: [0, 1]
  - sources:
      - model: *MODEL
        layer_range: [0, 1]
        <<: *scale_filter_env
  - sources:
      - model: *MODEL
        layer_range: [2, 3]
merge_method: passthrough
dtype: float32
""",
    "gradients and filters of task vectors": """
models:
  - model: PARENTS/fp32/cos
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: PARENTS/fp32/fmt
    parameters:
      density: "0.5"
      weight: [0, 0.3, '0.7', 1e0]
  - model: PARENTS/fp32/third
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: PARENTS/fp32/base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "breadcrumbs in slices": """
base_model: PARENTS/fp32/base
dtype: float32
merge_method: breadcrumbs_ties
parameters:
  int8_mask: 1.0
  normalize: 0.0
slices:
- sources:
  - layer_range: [0, 3]
    model: PARENTS/fp32/base
  - layer_range: [0, 3]
    model: PARENTS/fp32/cos
    parameters:
      density: 0.9
      gamma: 0.04
      weight: 0.6
  - layer_range:
    - 0
    - 3
    model: PARENTS/fp32/fmt
    parameters: {density: "0.9", gamma: "0.05", weight: "0.3"}
""",
    "parameters at every level": """
slices:
  - sources:
      - model: PARENTS/fp32/cos
        layer_range: [0, 2]
        parameters:
          weight: 0.9
      - model: PARENTS/fp32/fmt
        layer_range: [1, 3]
    parameters:
      weight: [0.1, 0.5]
  - sources:
      - {model: PARENTS/fp32/third, layer_range: [2, 3], parameters: null}
      - model: PARENTS/fp32/cos
        layer_range: [0, 1]
        parameters:
          weight:
            - filter: self_attn
              value: 1
    residual_weight: 0.5
parameters:
  weight:
    - filter: v_proj
      value: [0.3, 0.6, 0.2]
    - filter: mlp
      value: 0.25
    - value: 0.75
  normalize: true
merge_method: linear
dtype: null
out_dtype: float32
""",
    "JSON with models as mappings": """
{"merge_method": "task_arithmetic", "base_model": {"model": {"path": "PARENTS/fp32/base"}},
 "models": [{"model": {"model": {"path": "PARENTS/fp32/cos", "revision": null}, "lora": null},
             "parameters": {"weight": 0.5}},
            {"model": {"model": "PARENTS/fp32/fmt"}, "parameters": {"weight": -0.25}}],
 "parameters": {"lambda": [0.8, 1.2]}, "dtype": "float32"}
""",
    "lines of Windows, a mapping for a list, filters outside the layers": """---\r
models:\r
  - model: PARENTS/fp32/cos\r
    parameters:\r
      weight:\r
        - filter: embed_tokens\r
          value: 0.9\r
        - filter: model.norm\r
          value: 0.1\r
        - filter: layers.1.\r
          value: [0, 1]\r
        - filter: "*"\r
          value: [1, 0.5]\r
  - model: PARENTS/fp32/third\r
    parameters:\r
      weight: {value: .2}\r
merge_method: linear\r
dtype: float32\r
slices: []\r
...\r
""",
    "frankenmerge with scales": """
dtype: torch.float32
merge_method: passthrough
slices:
- sources:
  - {layer_range: [0, 1], model: &parent PARENTS/fp32/cos}
- sources:
  - layer_range: [0, 1]
    model: *parent
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: "0.0"
        - value: 1
- sources:
  - model: PARENTS/fp32/fmt
    layer_range: [2, 3]
""",
    "a small number in letters": """
models:
  - model: PARENTS/fp32/base
  - model: PARENTS/fp32/cos
  - model: PARENTS/fp32/far
merge_method: karcher
parameters: {max_iter: 1000, tol: 1e-9}
dtype: float32
""",
    "a tied and an untied head": """
models:
  - model: PARENTS/bf16/cos
    parameters: {weight: 0.5}
  - model: PARENTS/untied/fmt
    parameters: {weight: 0.5}
merge_method: linear
parameters: {normalize: "true"}
dtype: float32
""",
}
