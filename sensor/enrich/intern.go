// SPDX-License-Identifier: Apache-2.0

package enrich

import "hash/maphash"

// interner gives equal bytes the same string, mostly: it is a cache with one
// place per hash, so it is bounded and never needs cleaning. Most processes share
// their paths, names and terminals with others.
type interner struct {
	seed  maphash.Seed
	slots [2048]string
}

const internMax = 512 // bytes; longer strings are seldom equal

func newInterner() *interner { return &interner{seed: maphash.MakeSeed()} }

func (n *interner) string(b []byte) string {
	if len(b) == 0 {
		return ""
	}
	if len(b) > internMax {
		return string(b)
	}
	s := &n.slots[maphash.Bytes(n.seed, b)%uint64(len(n.slots))]
	if *s != string(b) {
		*s = string(b)
	}
	return *s
}
