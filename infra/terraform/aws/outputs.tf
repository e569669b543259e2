output "output" {
  value       = "s3://${aws_s3_bucket.runs.bucket}/runs"
  description = "The value for `output:` in a job."
}

output "roles" {
  value       = { for name, role in aws_iam_role.mergeyard : name => role.arn }
  description = "For the annotations of infra/kuberay/base/serviceaccounts.yaml."
}
