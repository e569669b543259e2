locals {
  # role → its policies
  roles = {
    worker = ["worker"]
    driver = ["driver"]
    head   = ["driver", "launcher"]
  }
  attachments = merge([
    for role, policies in local.roles : { for policy in policies : "${role}-${policy}" => { role = role, policy = policy } }
  ]...)
}

data "aws_caller_identity" "current" {}

resource "aws_iam_policy" "mergeyard" {
  for_each = toset(["worker", "driver", "launcher"])
  name     = "mergeyard-${each.key}"
  policy = templatefile("${path.module}/policies/${each.key}.json", {
    bucket  = var.bucket
    models  = var.models_bucket
    account = data.aws_caller_identity.current.account_id
    region  = var.region
  })
}

resource "aws_iam_role" "mergeyard" {
  for_each = local.roles
  name     = "mergeyard-${each.key}"
  assume_role_policy = var.oidc_provider == null ? templatefile("${path.module}/policies/assumed-by-ec2.json", {}) : templatefile(
    "${path.module}/policies/assumed-by-eks.json",
    {
      account        = data.aws_caller_identity.current.account_id
      oidc_provider  = var.oidc_provider
      serviceaccount = "system:serviceaccount:${var.namespace}:mergeyard-${each.key}"
    }
  )
}

resource "aws_iam_role_policy_attachment" "mergeyard" {
  for_each   = local.attachments
  role       = aws_iam_role.mergeyard[each.value.role].name
  policy_arn = aws_iam_policy.mergeyard[each.value.policy].arn
}

resource "aws_iam_instance_profile" "mergeyard" {
  for_each = local.roles
  name     = "mergeyard-${each.key}"
  role     = aws_iam_role.mergeyard[each.key].name
}
