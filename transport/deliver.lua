-- SPDX-License-Identifier: Apache-2.0
--
-- deliver: the server side of protocol "edr/1". One call stores one batch of one
-- agent, all of it or nothing, exactly once, and says what the agent has to do
-- next. It draws no random number, touches only its KEYS, and reads
-- the clock only to trim by age.
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
--       8 limit     about how many entries the stream may keep; 0: any number; below 0:
--                   those of about so many milliseconds
--       9 codec     j  an entry for each record
--                   z  one entry for all of them
--       10...       j: n times id, timestamp, data
--                   z: data, a zstd frame of the records joined by line breaks
--
-- Replies
--   OK <last>             stored, or probed
--   OK <last> <session>   hello; the session it replaced, or - when none
--   DUP <last>            the whole batch had been stored before
--   GAP <last>            the server has less than the agent thinks: rewind
--   OVERLAP <last>        a part had been stored before: cut the batch again
--   FENCED <epoch> <session>  somebody else writes as this agent
--
-- It begins without "#!lua", which Redis knows since 7.0 only. A full server, or one that
-- may not write, so refuses the first write, HSET, and with it all of them.

-- Before 7.0 a server may be told to replicate the script, whose replicas would then make
-- ids of their own. Later ones replicate what it did, whatever they are told.
if redis.replicate_commands then redis.replicate_commands() end

local stream, cursors = KEYS[1], KEYS[2]
local agent, epoch, session, flag = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local after, first, n, limit = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local packed = ARGV[9] == 'z'

-- Lua's own conversion switches to 1e+15 notation; doubles are exact to 2^53.
local function int(v) return string.format('%.0f', v) end

local payload = n or 0
if payload > 0 then payload = packed and 1 or 3 * n end
if not after or not first or not n or not limit or #ARGV ~= 9 + payload or n > 0 and after >= first
  or not packed and ARGV[9] ~= 'j' then
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
local ends = packed and 0 or n - 1

-- No table of arguments: it would be a tenth of what the whole call costs.
local function store(i, ...)
  if i < ends or limit == 0 then
    return redis.pcall('XADD', stream, '*', ...)
  end
  -- Once a batch, and whole nodes only, which costs next to nothing.
  if limit > 0 then
    return redis.pcall('XADD', stream, 'MAXLEN', '~', int(limit), '*', ...)
  end
  -- By the clock that made the ids. What is replicated is the effect.
  local now = redis.call('TIME')
  return redis.pcall('XADD', stream, 'MINID', '~', int(now[1] * 1000 + math.floor(now[2] / 1000) + limit), '*', ...)
end

for i = 0, ends do
  local r
  if packed then
    r = store(i, 'agent', agent, 'epoch', epoch, 'seq', int(first), 'n', int(n), 'codec', 'z', 'data', ARGV[10])
  else
    local a = 10 + 3 * i
    r = store(i, 'id', ARGV[a], 'timestamp', ARGV[a + 1], 'data', ARGV[a + 2], 'agent', agent, 'epoch', epoch, 'seq', int(first + i))
  end
  if type(r) == 'table' and r.err then
    -- A script that fails is not rolled back: without this the cursor would
    -- claim records that the stream has refused (WRONGTYPE, NOPERM).
    if i == 0 then move(last) else move(first + i - 1) end
    return r
  end
end
return 'OK ' .. int(final)
