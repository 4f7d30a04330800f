// Package tests has the tests that need a real mount, a real KMS server, a kill or a
// benchmark. It runs the program as its users do.
package tests
