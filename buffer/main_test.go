// SPDX-License-Identifier: Apache-2.0

package buffer

import (
	"flag"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(killEnv); dir != "" {
		killChild(dir) // does not return
	}
	if list := os.Getenv(corpusEnv); list != "" {
		corpusChild(list) // does not return
	}
	if path := os.Getenv(mendEnv); path != "" {
		mendChild(path) // does not return
	}
	if spec := os.Getenv(cutLifeEnv); spec != "" {
		cutLifeChild(spec) // does not return
	}
	if spec := os.Getenv(cutReplayEnv); spec != "" {
		cutReplayChild(spec) // does not return
	}
	flag.Parse()
	goleak.VerifyTestMain(m)
}
