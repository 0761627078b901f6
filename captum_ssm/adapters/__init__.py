"""One file for each family of layers. Importing this package registers them all."""

from captum_ssm.adapters import s6 as s6
