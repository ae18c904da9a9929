#!lua
-- SPDX-License-Identifier: Apache-2.0
--
-- deliver: the server side of protocol "edr/1". One call stores one batch of one
-- agent, all of it or nothing, exactly once, and says what the agent has to do
-- next. It reads no clock, draws no random number and touches only its KEYS.
--
-- KEYS  1 stream
--       2 cursors: a hash, agent id -> <epoch>:<last seq stored>:<session>
-- ARGV  1 agent id
--       2 epoch     20 hex digits; a greater one is newer and starts at seq 1
--       3 session   24 hex digits: 20 for the process, 4 for its connection
--       4 flag      H  hello: install the session, whoever had it
--                   C  continue on a new connection: install the session if this
--                      process has it; what is still under way on the process's
--                      older connections is refused from then on
--                   P  probe: only answer, with the checks of a write
--                   W  write
--       5 after     what the server has, as far as the agent knows. What lies between
--                   it and first the agent no longer has, and has accounted for
--       6 first     seq of the first record, above after
--       7 n         number of records; 0 with H, C and P, as are after and first
--       8 limit     about how many entries the stream may keep; 0: any number
--       9...        n times: id, timestamp, data
--
-- Replies
--   OK <last>             stored, or probed
--   OK <last> <session>   hello; the session it replaced, or - when none
--   DUP <last>            the whole batch had been stored before
--   GAP <last>            the server has less than the agent thinks: rewind
--   OVERLAP <last>        a part had been stored before: cut the batch again
--   FENCED <epoch> <session>  somebody else writes as this agent
--
-- There is no allow-oom flag, so a full server refuses the call as a whole.

local stream, cursors = KEYS[1], KEYS[2]
local agent, epoch, session, flag = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local after, first, n, limit = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])

-- Lua's own conversion switches to 1e+15 notation; doubles are exact to 2^53.
local function int(v) return string.format('%.0f', v) end

if not after or not first or not n or not limit or #ARGV ~= 8 + 3 * n or n > 0 and after >= first then
  return redis.error_reply('EDRCALL malformed call')
end

local last, owner = 0, '-'
local cursor = redis.call('HGET', cursors, agent)
if cursor then
  local e, l, s = string.match(cursor, '^(%x+):(%d+):(%x+)$')
  if not e or #e ~= #epoch then
    return redis.error_reply('EDRCURSOR the cursor of this agent is not one of edr/1')
  end
  if e > epoch then
    return 'FENCED ' .. e .. ' ' .. s
  end
  if e == epoch then
    local mine = s == session or flag == 'H'
      or flag == 'C' and string.sub(s, 1, 20) == string.sub(session, 1, 20)
    if not mine then
      return 'FENCED ' .. e .. ' ' .. s
    end
    last, owner = tonumber(l), s
  end
end

local function move(seq)
  redis.call('HSET', cursors, agent, epoch .. ':' .. int(seq) .. ':' .. session)
end

if flag == 'H' or flag == 'C' then
  move(last)
end
if flag == 'H' then
  return 'OK ' .. int(last) .. ' ' .. owner
end
if flag == 'C' or flag == 'P' then
  return 'OK ' .. int(last)
end

local final = first + n - 1
-- Not "first > last + 1": a server that was emptied since it last answered must not
-- take a batch that follows a hole of the agent's for the next one.
if last < after then
  return 'GAP ' .. int(last)
end
if final <= last then
  return 'DUP ' .. int(last)
end
if first <= last then
  return 'OVERLAP ' .. int(last)
end

-- The cursor goes first: an append-only file that is cut inside this batch then
-- holds a cursor without entries, which the agent's next call repairs, and not
-- entries without a cursor, which would be stored twice.
move(final)
for i = 0, n - 1 do
  local a = 9 + 3 * i
  local add = {'XADD', stream, '*',
    'id', ARGV[a], 'timestamp', ARGV[a + 1], 'data', ARGV[a + 2],
    'agent', agent, 'epoch', epoch, 'seq', int(first + i)}
  if limit > 0 and i == n - 1 then
    -- Once a batch, and whole nodes only, which costs next to nothing.
    for at, word in ipairs({'MAXLEN', '~', int(limit)}) do table.insert(add, at + 2, word) end
  end
  local r = redis.pcall(unpack(add))
  if type(r) == 'table' and r.err then
    -- A script that fails is not rolled back: without this the cursor would
    -- claim records that the stream has refused (WRONGTYPE, NOPERM).
    if i == 0 then move(last) else move(first + i - 1) end
    return r
  end
end
return 'OK ' .. int(final)
