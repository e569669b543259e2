variable "bucket" {
  type        = string
  description = "The bucket of runs; it is made here."
}

variable "models_bucket" {
  type        = string
  description = "The bucket of parents; it is there already, and is only read."
}

variable "region" {
  type    = string
  default = "us-east-1"
}

variable "oidc_provider" {
  type        = string
  default     = null
  description = "Of the EKS cluster, without https://; null where the roles are for EC2."
}

variable "namespace" {
  type        = string
  default     = "mergeyard"
  description = "Of the pods on EKS."
}

variable "vpc_id" {
  type        = string
  default     = null
  description = "Where to make a gateway to S3; null where there is one."
}

variable "route_table_ids" {
  type    = list(string)
  default = []
}
