variable "bucket" {
  type        = string
  description = "The bucket for runs. This configuration creates it."
}

variable "models_bucket" {
  type        = string
  description = "The bucket with the parents. It must exist and is only read."
}

variable "region" {
  type    = string
  default = "us-east-1"
}

variable "oidc_provider" {
  type        = string
  default     = null
  description = "OIDC provider of the EKS cluster, without https://; null if the roles are for EC2."
}

variable "namespace" {
  type        = string
  default     = "mergeyard"
  description = "Namespace of the pods on EKS."
}

variable "vpc_id" {
  type        = string
  default     = null
  description = "VPC that gets a gateway endpoint for S3; null if it has one already."
}

variable "route_table_ids" {
  type    = list(string)
  default = []
}
