// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// decide makes a decision known, once in the log for engineers and once on a
// decisions stream for auditors, so that both say the same. The line has the
// decision's code, cause, states and ids beside what ctx binds.
func (a *Agent) decide(ctx context.Context, i event.SelfInfo) {
	level := zapcore.InfoLevel
	switch {
	case i.Severity >= 4:
		level = zapcore.ErrorLevel
	case i.Severity >= 2:
		level = zapcore.WarnLevel
	}
	fields := []zap.Field{zap.String(logging.KeyCode, i.Code), zap.String(logging.KeyReason, i.Message)}
	for _, f := range [][2]string{
		{"before", i.Before},
		{"after", i.After},
		{logging.KeyCaseID, i.CaseID},
		{logging.KeyInvestigationID, i.InvestigationID},
		{logging.KeyUserID, i.UserID},
	} {
		if f[1] != "" {
			ctx = logging.With(ctx, zap.String(f[0], f[1]))
		}
	}
	if i.Count > 0 {
		fields = append(fields, zap.Uint64(logging.KeyCount, i.Count))
	}
	logging.From(ctx).Log(level, "decided", fields...)
	a.sensor.Notify(i)
}
