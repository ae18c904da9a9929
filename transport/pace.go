// SPDX-License-Identifier: Apache-2.0

package transport

import "time"

// slowReply is from where on the server is taken to be short of time.
const slowReply = 100 * time.Millisecond

// pace is how long a batch waits for company: least while the server is quick, and
// up to most when it is not. A server with many agents pays per batch, so that
// fewer and fuller ones are what relieves it.
type pace struct {
	least, most time.Duration
	reply       time.Duration // moving average of the time until the verdict
}

// observe takes the time that the server took for a batch.
func (p *pace) observe(took time.Duration) {
	p.reply += (took - p.reply) / 8
}

func (p *pace) linger() time.Duration {
	if p.reply <= slowReply {
		return p.least
	}
	// Ten times the excess: 200 ms for a reply make the full second.
	return min(p.most, max(p.least, 10*(p.reply-slowReply)))
}
