// SPDX-License-Identifier: Apache-2.0

// Package buffer is the bounded, durable queue between the sensor and the
// transport: one bbolt file of a fixed size, one writer, one reader.
package buffer
